"""A study: what is chosen on validation, parts that are done once, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import write_decisions

from dso.baselines.baseline import Candidate
from dso.errors import UserError
from dso.evaluation.bias import bias_report
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.study import read_study
from dso.steering.model import Steering
from launch.commands.compare import run
from launch.config.schema import load_config
from launch.run.measure import thinned
from launch.study.arms import ABLATIONS, PUBLISHED, chosen_arms
from launch.study.folder import StudyFolder
from launch.study.gathering import limits_in_words
from launch.study.materials import Materials
from launch.study.tuning import Judge, at_kl, tune
from trainers.callbacks import Limits, Validation

BASE = Validation(step=0, bias=0.4, accuracy=0.8, kl=0.0, answer_mass=1.0, order_effect=0.3, neutral_kl=0.0)
LIMITS = Limits(kl_budget=0.2, neutral_kl=0.05, order_increase=0.0)
TWO = (Candidate("weak", SimpleNamespace()), Candidate("strong", SimpleNamespace()))


def chosen(measure: Any, scales: tuple[float, ...] = (1.0, 2.0), seconds: float = 1e9, **options: Any) -> Any:
    return tune(TWO, scales, Judge(measure, BASE), LIMITS, seconds, **options)


def row(bias: float, kl: float = 0.0, **others: float) -> Validation:
    return replace(BASE, step=1, bias=bias, kl=kl, **others)


def test_the_report_names_the_limits_that_are_set() -> None:
    few = "KL at most 0.2; answer mass at least 0.9 of the base's; accuracy at most 0.01 below the base's"
    assert limits_in_words(Limits(kl_budget=0.2)) == few
    assert limits_in_words(LIMITS).endswith("; order effect at most 0.0 above the base's")
    assert "; KL on unambiguous decisions at most 0.3; " in limits_in_words(Limits(unambiguous_kl=0.3, neutral_kl=0.1))


def test_the_least_biased_candidate_inside_the_limits_is_chosen_and_its_scale_refined() -> None:
    def measure(steering: object, scale: float) -> Validation:
        strong = steering is TWO[1].steering
        return row(0.4 - (0.1 if strong else 0.05) * scale, kl=0.05 * scale if strong else 0.0)

    found = chosen(measure)
    # The strong one at 2 is best; then at 2.8 (KL 0.14), then at 3.92 (KL 0.196); 5.49 is outside.
    assert (found.candidate.label, found.inside, found.why) == ("strong", True, "")
    assert found.scale == pytest.approx(2 * 1.4**2)


def test_what_keeps_no_limit_says_which_it_breaks() -> None:
    found = chosen(lambda _, scale: row(0.1, order_effect=0.31, kl=0.3))
    assert not found.inside
    assert found.why == "KL above 0.2; order effect above the base's"
    assert chosen(lambda _, scale: row(0.4)).why == "no less biased than the base model"
    assert chosen(lambda _, scale: row(math.nan)).why == "no less biased than the base model"


def test_scales_beyond_hope_are_not_measured_and_time_ends_the_search() -> None:
    asked: list[float] = []

    def measure(_: object, scale: float) -> Validation:
        asked.append(scale)
        return row(0.3, kl=2.0)  # ten times the budget

    chosen(measure, scales=(1.0, 2.0, 4.0, 8.0))
    assert asked[:2] == [1.0, 1.0]  # the first scale of each candidate
    clock = iter(range(100))
    asked.clear()
    assert chosen(lambda _, scale: row(0.3), seconds=2.0, clock=lambda: next(clock)).tried == 2


def test_a_method_without_a_strength_is_tried_at_one_scale() -> None:
    assert chosen(lambda _, scale: row(0.3), scales=(1.0,)).tried == 2
    with pytest.raises(UserError, match="proposed no candidate"):
        tune((), (1.0,), Judge(lambda *_: row(0.1), BASE), LIMITS, 1.0)


class Asked:
    """A judge that remembers what it was asked; ``bias`` of a candidate's place and a scale."""

    def __init__(self, bias: Callable[[int, float], float], base: Validation = BASE):
        self.looks: list[tuple[int, float]] = []
        self.judge = Judge(self.measure, base)
        self._bias = bias

    def measure(self, steering: Any, scale: float) -> Validation:
        self.looks.append((steering.place, scale))
        return row(self._bias(steering.place, scale))


def many(count: int) -> list[Candidate]:
    return [Candidate(f"layer {n}", SimpleNamespace(place=n)) for n in range(count)]


def test_a_part_of_validation_chooses_what_the_whole_is_asked_of() -> None:
    """The part likes late candidates and high scales; the whole, of the four best of these, candidate 8 at 1 most."""
    part = Asked(lambda place, scale: 0.3 - 0.01 * place - 0.001 * scale)
    whole = Asked(lambda place, scale: 0.1 if (place, scale) == (8, 1.0) else 0.2 + 0.001 * place)
    found = tune(many(10), (1.0, 2.0), whole.judge, LIMITS, 1e9, part=part.judge)
    assert part.looks == [(place, scale) for place in range(10) for scale in (1.0, 2.0)]
    assert whole.looks[:4] == [(9, 2.0), (9, 1.0), (8, 2.0), (8, 1.0)]
    assert whole.looks[4:] == [(8, 1.4), (8, pytest.approx(1 / 1.4))]  # beside the best, on the whole
    assert (found.candidate.label, found.scale, found.tried) == ("layer 8", 1.0, 22)


def test_each_judge_holds_a_candidate_against_its_own_base_model() -> None:
    """On the part nothing is less biased than the base model, so its least biased goes on to the whole."""
    part = Asked(lambda place, scale: 0.3 - 0.1 * place, replace(BASE, bias=0.1))
    whole = Asked(lambda place, scale: 0.3)
    found = tune(many(2), (1.0, 2.0), whole.judge, LIMITS, 1e9, part=part.judge)
    assert found.inside and whole.looks[0] == (1, 1.0)


def test_a_part_has_half_of_the_time_that_making_the_first_candidate_left() -> None:
    """A look takes 1 second, making a candidate 10: of 30, 10 are left to the part, and over as the second is made."""
    now = [0.0]

    def made() -> Iterator[Candidate]:
        for candidate in many(3):
            now[0] += 10.0
            yield candidate

    def slow(judge: Judge) -> Judge:
        def measure(steering: Any, scale: float) -> Validation:
            now[0] += 1.0
            return judge.measure(steering, scale)

        return Judge(measure, judge.base)

    part, whole = Asked(lambda *_: 0.3), Asked(lambda *_: 0.3)
    tune(made(), (1.0, 2.0), slow(whole.judge), LIMITS, 30.0, lambda: now[0], slow(part.judge))
    assert part.looks == [(0, 1.0), (0, 2.0), (1, 1.0)]  # the second was in the making when the part's time was over
    assert len(whole.looks) > 3 and now[0] <= 30.0


def test_a_scale_is_found_for_a_kl() -> None:
    assert at_kl(lambda scale: 0.8 * scale**2, 0.2) == pytest.approx(0.5)
    assert at_kl(lambda scale: 0.002 * scale**1.5, 0.2) == pytest.approx(100 ** (1 / 1.5), rel=0.05)
    assert at_kl(lambda scale: 0.8 * scale**2, 0.9, highest=1.0) == 1.0


def test_methods_are_asked_for_by_name_or_group() -> None:
    assert [arm.name for arm in chosen_arms(["published", "ours"])] == ["ours", "published"]
    assert {arm.name for arm in chosen_arms(["ablations"])} == {arm.name for arm in ABLATIONS}
    assert not {arm.kind for arm in chosen_arms(["rivals"])} & {"ablation"}
    own = "constraints.anchors=shipped"
    configs = {arm.name: load_config("smollm2-roles", [own, *arm.overrides]) for arm in (PUBLISHED, *ABLATIONS)}
    assert {name for name, config in configs.items() if config.constraints.anchors} == {"published-anchors"}
    with pytest.raises(UserError, match="no method is named 'cas'; did you mean caa"):
        chosen_arms(["cas"])


def study_config(folder: Path, model: Path) -> Path:
    values = {
        "model": {"name": str(model)},
        "data": {"set": str(write_decisions(folder / "letters.jsonl"))},
        "steering": {"operator": "scale"},
        "train": {"estimator": "regression", "max_steps": 2, "optimizer": {"fisher_batches": 1}},
        "constraints": {"neutral_texts": str(folder / "neutral.txt"), "neutral_kl": 1.0},
    }
    (folder / "neutral.txt").write_text("A day\nThe sea\n")
    path = folder / "own.yaml"
    path.write_text(json.dumps(values))
    return path


def test_what_learns_is_held_to_the_texts_that_ours_is(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "anchors.txt").write_text("The sea is wide.\nA day has\\nhours.\n")
    config = str(study_config(tmp_path, model_folder))
    for override, wanted in (
        (f"constraints.anchors={tmp_path / 'anchors.txt'}", ("The sea is wide.", "A day has\nhours.")),
        ("constraints.anchors=null", ()),
    ):
        materials = Materials(load_config(config, [override]), tmp_path / "training.safetensors")
        assert materials.task(0, 1.0).anchors == wanted


def test_a_part_is_validation_thinned_where_that_is_less(tmp_path: Path, model_folder: Path) -> None:
    """Each is held against what its own decisions say of the base model; few contexts a unit are not thinned."""
    config, cache = str(study_config(tmp_path, model_folder)), tmp_path / "training.safetensors"
    few = Materials(load_config(config, []), cache)
    assert few.part is None
    options = "{train_blocks: 1, units: {validation: 3, test: 1}, unambiguous: {validation: 2, test: 1}}"
    many = Materials(load_config(config, ["data.set=roles", f"data.options={options}"]), cache)
    assert many.part is not None
    asked = [many.asked["validation"], thinned(many.asked["validation"])]
    assert len(asked[1]) < len(asked[0]) and many.part.base.bias != many.judge.base.bias
    untrained = Steering.for_model(many.backbone.model, operator="scale")
    for judge, decisions in zip((many.judge, many.part), asked, strict=True):
        policy = Evaluator(many.backbone, decisions).measure(0.0).policy
        assert judge.base.bias == pytest.approx(bias_report(policy, decisions, bootstrap=0).probability.signed_root)
        found = judge.measure(untrained, 1.0)
        assert (found.bias, found.kl, found.answer_mass) == pytest.approx((judge.base.bias, 0.0, 1.0), abs=1e-6)


def compare(config: Path, out: Path, *extra: str, methods: str = "ours,published,caa,random", seeds: str = "0") -> int:
    from launch.commands.parsers import build_parser

    words = ["compare", str(config), *extra, "--methods", methods, "--seeds", seeds, "--seconds", "20"]
    return run(build_parser().parse_args([*words, "--out", str(out), "--quiet"]))


def test_a_study_is_made_in_parts_that_are_done_once(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = study_config(tmp_path, model_folder), tmp_path / "study"
    assert compare(config, out, "train.ambiguous=16") == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    assert "random directions" in (out / "report.html").read_text()
    study = read_study(out / "study.json")
    kinds = {method.name: (method.kind, len(method.trials)) for method in study.methods}
    assert kinds == {"ours": ("ours", 1), "published": ("rival", 1), "caa": ("rival", 1), "random": ("null", 10)}
    assert study.base.result.scale == 0
    assert {row["category"] for row in study.audit["steered"]["rows"]} == {"female", "male"}
    for method in study.methods:
        for trial in method.trials:
            assert trial.points
            assert all(point.result.cut is not None for point in trial.points)
    assert study.to_json() == json.loads((out / "study.json").read_text())  # it is read without a loss
    monkeypatch.setattr("launch.study.running.write_report", lambda study, folder: study.write(folder / "study.json"))
    crows = tmp_path / "data" / "crows_pairs"
    crows.mkdir(parents=True)
    rows = [("The old one fell", "The new one fell", "age"), ("Big men ate", "Thin men ate", "physical-appearance")]
    lines = [f"{n},{more},{less},stereo,{about},[],[],x,x" for n, (more, less, about) in enumerate(rows * 4)]
    header = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer,anon_annotators,x"
    (crows / "crows_pairs_anonymized.csv").write_text("\n".join([header, *lines]))
    (tmp_path / "data" / "arc").mkdir()
    (tmp_path / "data" / "arc" / "ARC-Easy_test.csv").write_text(
        "Is ice cold?,Yes,No,Red,Blue,A\nIs sky blue?,No,Yes,Up,It,B\n"
    )
    assert compare(config, out, "train.ambiguous=16", "--data", str(tmp_path / "data")) == 0
    spilled, capable = (found := read_study(out / "study.json")).spillover, found.capability
    assert [(row["figure"], row["scale"]) for row in capable] == [
        (figure, scale) for scale in (0.5, 1.0) for figure in ("accuracy", "perplexity")
    ]
    assert {row["attribute"] for row in spilled["rows"]} == {"age", "appearance"}
    before = {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert compare(config, out, "train.ambiguous=16") == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("parts/*.json")} == before
    with pytest.raises(UserError, match=r"holds a study of other settings: train.ambiguous was 16 and is 8"):
        compare(config, out, "train.ambiguous=8")


def test_a_folder_that_is_no_study_is_left_alone(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and holds no study"):
        compare(study_config(tmp_path, model_folder), tmp_path / "mine")
    with pytest.raises(UserError, match="measures probabilities of candidates"):
        compare(Path("smollm2-roles-freeform"), tmp_path / "new")
    with pytest.raises(UserError, match=r"--seeds '0.5': expected comma-separated whole numbers, as in 0,1,2"):
        compare(study_config(tmp_path, model_folder), tmp_path / "new", seeds="0.5")
    with pytest.raises(UserError, match="--split is of two steerings"):
        compare(study_config(tmp_path, model_folder), tmp_path / "new", "--split", "validation")
    with pytest.raises(UserError, match="expected a config, with key=value settings if you like, or two steerings"):
        run(SimpleNamespace(what=["a", "b", "c"]))


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    (tmp_path / "parts").mkdir()
    folder.part("caa", 1).write_text("{")
    with pytest.raises(UserError, match="caa-s1.json: cannot be read .* remove it, and it is made again"):
        folder.trials("caa")


def test_a_part_that_another_process_is_at_is_left_to_it(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    (tmp_path / "parts").mkdir()
    with folder.taking("caa", 0) as mine, folder.taking("caa", 0) as same, folder.taking("caa", 1) as other:
        assert (mine, same, other) == (True, False, True)
    with folder.taking("caa", 0) as again:  # it was not done, so whoever comes next may
        assert again
        folder.keep("caa", 0, {"failed": "no place"})
    with folder.taking("caa", 0) as done:
        assert not done
    assert not list(tmp_path.glob("parts/caa-s0.lock"))


def test_two_processes_share_a_study(tmp_path: Path, model_folder: Path) -> None:
    config, out = study_config(tmp_path, model_folder), tmp_path / "study"
    asked = ("--methods", "ours,caa,iti,random", "--seeds", "0,1", "--seconds", "1", "--out", str(out))
    command = [sys.executable, "-m", "launch.cli", "compare", str(config), "train.ambiguous=16", *asked]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    done = [line.split(": ", 2)[2] for _, stderr in told for line in stderr.splitlines() if " of 16: " in line]
    assert len(done) == len(set(done)) == 16  # each part in one of them
    assert all(" of 16: " in stderr for _, stderr in told)  # and neither did all
    kinds = {method.name: len(method.trials) for method in read_study(out / "study.json").methods}
    assert kinds == {"ours": 2, "caa": 2, "iti": 2, "random": 10}


def test_published_is_what_the_paper_says(tmp_path: Path, model_folder: Path) -> None:
    config = load_config("smollm2-roles", PUBLISHED.overrides)
    assert (config.train.estimator, config.train.reward, config.steering.operator) == ("reinforce", "sign", "affine")
    assert (config.constraints.kl_budget, config.constraints.neutral_kl, config.train.unambiguous) == (None, None, 0)
    for arm in ABLATIONS:
        load_config("smollm2-roles", arm.overrides)
