"""A training run: what it leaves, what is shipped, and what it cannot be made of."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import FILES, config_of, rows_of
from small_runs import contents, write_decisions
from tiny import tiny_llama

from dso.decisions.decision import DecisionSet
from dso.decisions.sets import load_decisions
from dso.errors import UserError
from dso.evaluation.bias import bias_report
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.report import ScalePoint
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.config.schema import ConfigError, TrainConfig, load_config, resolved_yaml
from launch.run.measure import scale_points, thin, thinned
from launch.run.session import open_session
from launch.run.train import Result, train
from launch.run.trainer import held_constraints, reward_config, schedule
from trainers.callbacks import Limits
from trainers.constraints import Constraints, FixedKL, KLBudget


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> tuple[TrainConfig, Result]:
    """One run of six steps, whole; not to be written to."""
    config = config_of(tmp_path_factory.mktemp("run"), model_folder)
    return config, train(config, name="unused", quiet=True)


# What a run leaves


def test_the_folder_of_a_run(run: tuple[TrainConfig, Result]) -> None:
    config, result = run
    assert result.folder == Path(config.run.output_dir) / "letters"
    assert contents(result.folder).keys() == FILES
    assert load_config(str(result.folder / "config.yaml")) == config
    assert (result.folder / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = (result.folder / "report.md").read_text()
    assert "| scale |" in report
    assert "![curve](curve.png)" in report
    assert "nurse" in report


def test_every_step_and_measurement_is_recorded(run: tuple[TrainConfig, Result]) -> None:
    rows = rows_of(run[1].folder)
    assert [row["step"] for row in rows if "train/kl" in row] == [20, 40, 60, 80, 100, 120]
    assert [row["step"] for row in rows if "eval/bias" in row] == [0, 40, 80, 120]
    history = json.loads((run[1].folder / "validation.json").read_text())
    learned, turned = ([row for row in history if (row["scale"] == 1) == own] for own in (True, False))
    assert [(row["step"], row["decisions"]) for row in learned] == [(0, 0), (2, 40), (4, 80), (6, 120)]
    assert [row["eval/bias"] for row in rows if "eval/bias" in row] == [row["bias"] for row in learned]
    # In the end the last operators are turned up, doubled and then halfway back; that is no step of learning.
    assert turned and history == [*learned, *turned]
    assert {(row["step"], row["decisions"]) for row in turned} == {(6, 120)}
    scales = [row["scale"] for row in turned]
    doublings = scales.index(max(scales)) + 1
    assert scales[:doublings] == [2.0, 4.0, 8.0][:doublings]
    assert len(scales) - doublings <= 2


def test_the_curve_is_measured_on_the_test_split(run: tuple[TrainConfig, Result], model_folder: Path) -> None:
    config, result = run
    points = [ScalePoint.from_json(record) for record in json.loads((result.folder / "curve.json").read_text())]
    assert points == result.points
    assert [point.scale for point in points] == [0.0, 0.5, 1.0]
    assert points[0].kl == 0.0
    assert 0 < points[1].kl < points[2].kl
    assert points[2].bias.bias.value < points[0].bias.bias.value - 0.05
    assert {point.bias.n_decisions for point in points} == {12}


def test_what_is_shipped_is_what_was_measured(run: tuple[TrainConfig, Result], model_folder: Path) -> None:
    config, result = run
    steering = Steering.from_pretrained(result.folder / "steering")
    assert steering.config.base_model == str(model_folder)
    assert steering.config.groups == ("female", "male")
    assert steering.config.target == (0.5, 0.5)
    assert steering.config.scale_range == (0.0, 1.0)
    assert [row["scale"] for row in steering.config.scale_curve] == [0.0, 0.5, 1.0]
    backbone = Backbone.load(str(model_folder), device="cpu")
    data = load_decisions(config.data.set).select(split="test")
    evaluator = Evaluator(backbone, data, steering.attach(backbone.model))
    again = scale_points(evaluator, [0.0, 0.5, 1.0], None, 20)
    for found, wanted in zip(again, result.points, strict=True):
        assert found.bias.bias.value == pytest.approx(wanted.bias.bias.value, abs=1e-6)
        assert found.kl == pytest.approx(wanted.kl, abs=1e-6)


def shipped(config: TrainConfig, folder: Path) -> ScalePoint:
    """The validation split with the steering that a run left."""
    backbone = Backbone.load(config.model.name, device="cpu")
    data = load_decisions(config.data.set).select(split="validation")
    steering = Steering.from_pretrained(folder / "steering")
    (point,) = scale_points(Evaluator(backbone, data, steering.attach(backbone.model)), [1.0], None, 1)
    return point


def test_the_best_candidate_inside_the_constraints_is_shipped(run: tuple[TrainConfig, Result]) -> None:
    config, result = run
    history = json.loads((result.folder / "validation.json").read_text())
    base = history[0]
    inside = [
        row for row in history
        if row["kl"] <= 0.7 * 0.2 and row["answer_mass"] >= 0.9 and row["accuracy"] >= base["accuracy"] - 0.01
    ]  # fmt: skip
    best = min(inside, key=lambda row: row["bias"])
    assert best["step"] > 0
    point = shipped(config, result.folder)
    assert point.kl == pytest.approx(best["kl"], abs=1e-6)
    assert point.bias.probability.signed_root == pytest.approx(best["bias"], abs=1e-5)
    assert point.accuracy.value == best["accuracy"]


def test_a_steering_stays_inside_the_limit_on_unambiguous_decisions(tmp_path: Path, model_folder: Path) -> None:
    def history(limit: float | None) -> tuple[Path, list[dict[str, Any]]]:
        options = {"train__max_steps": 2, "constraints__unambiguous_kl": limit}
        folder = train(config_of(tmp_path / str(limit), model_folder, **options), name="x", quiet=True).folder
        return folder, json.loads((folder / "validation.json").read_text())

    free, rows = history(None)
    spent = next(row for row in rows if row["step"] == 2)["unambiguous_kl"]  # before it was turned up
    assert not any("train/unambiguous_coefficient" in row for row in rows_of(free))
    held, rows = history(spent / 4)
    kept = min((row for row in rows if row["unambiguous_kl"] <= spent / 4), key=lambda row: row["bias"])
    assert 0 < kept["scale"] < 1
    assert kept["unambiguous_kl"] == pytest.approx(spent / 4, rel=0.2)
    assert kept["kl"] < 0.7 * 0.2  # the other budget is slack
    first = next(row for row in rows_of(held) if "train/kl" in row)
    assert first["train/unambiguous_coefficient"] == pytest.approx(0.3)
    point = shipped(config_of(tmp_path, model_folder), held)
    assert point.kl_unambiguous == pytest.approx(kept["unambiguous_kl"], rel=1e-3)


def test_where_the_budget_is_too_small_a_steering_turned_down_to_it_is_shipped(
    tmp_path: Path, model_folder: Path
) -> None:
    free = train(config_of(tmp_path / "free", model_folder, train__max_steps=2), name="x", quiet=True)
    history = json.loads((free.folder / "validation.json").read_text())
    spent = [row for row in history if row["scale"] == 1][-1]["kl"]  # of the last step, before it was turned up
    budget = spent / 10
    config = config_of(
        tmp_path / "held",
        model_folder,
        constraints__kl_budget=budget,
        train__max_steps=2,
    )
    result = train(config, name="x", quiet=True)
    history = json.loads((result.folder / "validation.json").read_text())
    kept = min((row for row in history if row["kl"] <= 0.7 * budget), key=lambda row: row["bias"])
    assert 0 < kept["scale"] < 1
    assert kept["kl"] == pytest.approx(0.7 * budget, rel=0.15)
    assert kept["bias"] < history[0]["bias"]
    point = shipped(config, result.folder)
    assert point.kl == pytest.approx(kept["kl"], rel=1e-3)
    assert point.bias.probability.signed_root == pytest.approx(kept["bias"], abs=1e-5)


@pytest.mark.parametrize(("asked", "held"), [(0.97, 0.97), (None, 0.9)])
def test_selection_holds_a_steering_to_the_answer_mass_that_a_config_asks_for(
    asked: float | None, held: float, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(Exception):
        """Ends the run where its selection is made."""

    def make(*_: Any, limits: Limits, **__: Any) -> None:
        raise Made(limits.min_answer_mass)

    monkeypatch.setattr("launch.run.learn.Selection", make)
    with pytest.raises(Made) as found:
        train(config_of(tmp_path, model_folder, constraints__min_answer_mass=asked), name="unused", quiet=True)
    assert found.value.args == (held,)


@pytest.mark.parametrize(("contexts", "share"), [(12, 3), (11, 1)])
def test_units_with_many_contexts_are_asked_about_in_a_third_of_them(contexts: int, share: int) -> None:
    full = load_decisions("roles", splits=["validation"], units={"validation": 9}, unambiguous={"validation": 8})
    known = [d.context for d in full if d.ambiguous]
    chosen = list(dict.fromkeys(known))[:contexts]
    data = full.select(lambda d: not d.ambiguous or d.context in chosen)
    asked = thinned(data)
    assert len(asked.select(kind="unambiguous")) == 8
    assert len(asked.select(kind="ambiguous")) == 9 * 2 * contexts // share
    nameless = DecisionSet(tuple(replace(d, unit="") for d in data), data.groups, "x")
    assert thinned(nameless) == nameless  # each of them is a unit of its own


@pytest.mark.parametrize(("stride", "units", "left"), [(3, 38, 0.002), (3, 4, 1e-6), (2, 5, 1e-6), (4, 9, 1e-6)])
def test_liking_for_people_cancels_from_thinned_contexts(stride: int, units: int, left: float) -> None:
    """All of it, but for a trace with many people: the least squares take them for random ones."""
    full = load_decisions("roles", splits=["validation"], units={"validation": units}, unambiguous={"validation": 8})
    data = thin(full, stride)
    ambiguous = data.select(kind="ambiguous")
    assert len(data.select(kind="unambiguous")) == 8
    met = Counter((d.unit, d.context) for d in ambiguous)
    assert set(met.values()) == {2}  # both orders
    assert max(Counter(u for u, _ in met).values()) - min(Counter(u for u, _ in met).values()) <= 1
    assert len(met) == pytest.approx(units * 30 / stride, rel=0.1)
    assert len({d.context for d in ambiguous}) == 30
    odds = {unit: np.random.default_rng(i).uniform(0.1, 0.9) for i, unit in enumerate(dict.fromkeys(u for u, _ in met))}
    probs = np.array([[odds[d.unit], 1 - odds[d.unit]] for d in ambiguous])
    found = bias_report(probs, ambiguous, bootstrap=0).probability
    assert found.context_part.value == pytest.approx(0.0, abs=left)  # no part of the contexts hangs loose


def test_scales_beyond_one_are_measured_and_allowed(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=1, evaluation__scales=[0.5, 1.5])
    result = train(config, name="x", quiet=True)
    assert [point.scale for point in result.points] == [0.0, 0.5, 1.5]  # the base is always there
    assert Steering.from_pretrained(result.folder / "steering").config.scale_range == (0.0, 1.5)


def test_contexts_of_one_unit_are_selected_by_their_bias_as_measured(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder, train__max_steps=2)
    data = load_decisions(config.data.set)
    only = [d for d in data if d.split != "validation" or not d.ambiguous or d.unit == "0"]
    type(data)(tuple(only), data.groups).write_jsonl(config.data.set)
    result = train(config, name="x", quiet=True)
    history = json.loads((result.folder / "validation.json").read_text())
    kept = type(data)(tuple(d for d in only if d.split == "validation"), data.groups)
    (base,) = scale_points(Evaluator(Backbone.load(str(model_folder), device="cpu"), kept), [0.0], None, 0)
    sizes = base.bias.context_bias.values()
    assert history[0]["bias"] == pytest.approx(math.sqrt(sum(size**2 for size in sizes) / len(sizes)), abs=1e-6)


# A run that starts from a steering


def started(tmp_path: Path, model_folder: Path, **facts: Any) -> tuple[Path, Steering]:
    """A steering with random coefficients for the model of a config, in a folder."""
    backbone = Backbone.load(str(model_folder), device="cpu")
    steering = Steering.for_model(backbone.model, base_model=str(model_folder), groups=("female", "male"), **facts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in steering.tensors().values():
            value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    steering.save_pretrained(tmp_path / "start")
    return tmp_path / "start", steering


def test_a_run_begins_with_what_the_given_steering_does_and_is_held_to_the_base_model(
    tmp_path: Path, model_folder: Path
) -> None:
    start, steering = started(tmp_path, model_folder)
    config = config_of(
        tmp_path, model_folder, steering__init=str(start), train__max_steps=1, train__optimizer__learning_rate=1e-12
    )
    backbone = Backbone.load(str(model_folder), device="cpu")
    data = load_decisions(config.data.set).select(split="validation")
    base, given = scale_points(Evaluator(backbone, data, steering.attach(backbone.model)), [0.0, 1.0], None, 1)
    assert given.kl > 0.01
    session = open_session(config)
    assert all(torch.equal(session.steering.tensors()[key], value) for key, value in steering.tensors().items())
    result = train(config, name="x", quiet=True)
    nothing, after = [row for row in json.loads((result.folder / "validation.json").read_text()) if row["scale"] == 1]
    assert nothing["step"] == 0 and nothing["kl"] == 0
    assert nothing["bias"] == pytest.approx(base.bias.probability.signed_root, abs=1e-6)
    assert after["step"] == 1 and after["kl"] == pytest.approx(given.kl, abs=1e-6)
    assert after["bias"] == pytest.approx(given.bias.probability.signed_root, abs=1e-5)


def test_where_nothing_is_inside_the_limits_the_base_model_is_kept_not_the_start(
    tmp_path: Path, model_folder: Path
) -> None:
    start, _ = started(tmp_path, model_folder)
    config = config_of(
        tmp_path, model_folder, steering__init=str(start), train__max_steps=1, train__optimizer__learning_rate=1e-12,
        constraints__kl_budget=1e-9,
    )  # fmt: skip
    result = train(config, name="x", quiet=True)
    kept = Steering.from_pretrained(result.folder / "steering")
    assert not any(value.abs().max() > 1e-3 for value in kept.tensors().values())


def test_a_start_that_is_another_operator_or_for_another_model_is_refused(tmp_path: Path, model_folder: Path) -> None:
    start, _ = started(tmp_path, model_folder, operator="scale")
    with pytest.raises(ConfigError, match=r"steering\.init: .*start cannot be started from: .*\.b' is missing"):
        open_session(config_of(tmp_path, model_folder, steering__init=str(start)))
    config = config_of(tmp_path, model_folder, steering__init=str(start), steering__operator="scale")
    other = tiny_llama()
    other.model.layers[0].input_layernorm.weight.data[0] = 2.0
    Steering.for_model(other, operator="scale").save_pretrained(start)
    with pytest.raises(ConfigError, match="weights of module 'model.layers.0.input_layernorm' are not the ones"):
        open_session(config)
    with pytest.raises(UserError, match="nowhere"):
        open_session(config_of(tmp_path, model_folder, steering__init=str(tmp_path / "nowhere")))


# A session


def test_a_session_is_what_the_config_says(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(
        tmp_path,
        model_folder,
        steering__operator="low_rank",
        steering__rank=2,
        steering__sites=[r"model\.norm", r".*input_layernorm"],
        data__target={"female": 0.3, "male": 0.7},
        train__estimator="ppo",
        train__ppo__n_epochs=3,
        train__ppo__clip_range=0.3,
        train__baseline="value",
        constraints__sparsity=0.25,
    )
    session = open_session(config)
    trainer = session.trainer
    assert list(session.steering.config.sites) == [
        "model.layers.0.input_layernorm",
        "model.layers.1.input_layernorm",
        "model.norm",
    ]
    assert session.steering.config.target == (0.3, 0.7)
    assert session.steering.operators["model.norm"].u.shape == (16, 2)
    assert trainer.task.target.tolist() == pytest.approx([0.3, 0.7])
    assert (trainer.estimator, trainer.n_epochs, trainer.clip_range(1.0), trainer.sparsity) == ("ppo", 3, 0.3, 0.25)
    assert trainer.policy.optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert trainer.policy.value_head is not None
    assert isinstance(trainer.kl, KLBudget)
    assert (trainer.kl.budget, trainer.kl.coefficient) == (0.2, pytest.approx(0.5))
    assert trainer.env.num_envs == 20
    assert {d.split for d in trainer.task.decisions} == {"train"}


def test_blocks_are_forgiven_where_nothing_of_what_all_contexts_share_counts() -> None:
    shares = (0.0, 0.01, 1.0)
    configs = [load_config("smollm2-roles", [f"train.preference.common_weight={share}"]) for share in shares]
    assert [reward_config(config).block_weight for config in configs] == [0.16, 1.0, 1.0]
    assert reward_config(load_config("smollm2-roles")).block_weight == 0.16


def test_a_fixed_price_instead_of_a_budget(tmp_path: Path, model_folder: Path) -> None:
    options = {"constraints__kl_budget": None, "constraints__beta": 0.7}
    kl = open_session(config_of(tmp_path, model_folder, **options)).trainer.kl
    assert isinstance(kl, FixedKL)
    assert kl.coefficient == 0.7


def test_each_limit_of_a_config_has_a_dual_variable() -> None:
    def held(*overrides: str) -> Constraints:
        return held_constraints(load_config("smollm2-roles", list(overrides)))

    ours = held()  # the regression learns towards the base model's order effect, so nothing has to hold it
    assert ours.coefficients() == {"kl_coefficient": 0.5, "mass_coefficient": 0.0, "anchor_coefficient": 15.0}
    assert (ours.kl.budget, ours.anchors.budget, ours.mass_floor.share) == (0.3, 0.065, 0.95)
    assert isinstance(held("constraints.neutral_kl=null").anchors, FixedKL)
    for estimator in ("expected", "reinforce"):
        assert held(f"train.estimator={estimator}", "constraints.order_increase=0.02").order.increase == 0.02
        assert held(f"train.estimator={estimator}", "constraints.order_increase=null").order is None
    facts = held("constraints.unambiguous_kl=0.4").unambiguous
    assert (facts.budget, facts.coefficient) == (0.4, pytest.approx(0.3))
    assert held("constraints.unambiguous_kl=0.4", "train.unambiguous=0").unambiguous is None  # none to be seen
    nothing = ("constraints.anchors=null", "constraints.min_answer_mass=null", "constraints.order_increase=null")
    assert held(*nothing).coefficients() == {"kl_coefficient": 0.5}


def test_the_schedule_by_hand() -> None:
    rate = schedule(2.0)
    third = 2 * (0.05 + 0.95 * (0.5 + math.cos(math.pi / 3) / 2))
    assert [rate(left) for left in (1.0, 0.95, 0.9, 0.6, 0.45, 0.0)] == pytest.approx(
        [0.1, 1.0, 2.0, third, 2 * (0.05 + 0.95 * 0.5), 0.1]
    )


def unusable(tmp_path: Path, model_folder: Path, **options: Any) -> str:
    """The message of a run that is refused; nothing is written."""
    config = config_of(tmp_path, model_folder, **options)
    with pytest.raises(UserError) as caught:
        train(config, name="x")
    assert not Path(config.run.output_dir).exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model__name": "./no/such/model"}, "model './no/such/model': no "),
        ({"model__device": "gpu"}, "model.device: 'gpu' cannot be used: "),
        ({"data__set": "./no.jsonl"}, "no.jsonl: cannot be read: No such file"),
        ({"data__options": {"pairs": 3}}, "unknown option 'pairs'"),
        ({"data__options": {"groups": ["female", "x"]}}, "unknown group 'male'; known are abstain, female, x"),
        ({"data__target": {"women": 0.5, "men": 0.5}}, "the target names groups ['men', 'women']"),
        ({"steering__sites": ["(", "x"]}, "steering: site pattern '(' is no regular expression"),
        ({"steering__sites": ["nothing"]}, "steering: site pattern 'nothing' matches no norm"),
        ({"steering__operator": "low_rank", "steering__rank": 17}, "steering: rank is 17, expected 1 to 16"),
    ],
)
def test_what_a_run_cannot_be_made_of_is_refused_before_anything_is_written(
    tmp_path: Path, model_folder: Path, options: dict[str, Any], message: str
) -> None:
    assert message in unusable(tmp_path, model_folder, **options)


def test_a_split_without_facts_to_mix_in_is_refused(tmp_path: Path, model_folder: Path) -> None:
    config = config_of(tmp_path, model_folder)
    write_decisions(Path(config.data.set), facts=False)
    with pytest.raises(ConfigError, match="train.unambiguous: the split 'train' of .* set it to 0"):
        open_session(config)
    config = config_of(tmp_path, model_folder, train__unambiguous=0)
    write_decisions(Path(config.data.set), facts=False)
    result = train(config, name="x", quiet=True)
    assert np.isnan(result.points[0].accuracy.value)
    held = config.model_copy(update={"constraints": config.constraints.model_copy(update={"unambiguous_kl": 0.1})})
    with pytest.raises(ConfigError, match="constraints.unambiguous_kl: the split 'validation' of .* set it to null"):
        open_session(held)


def test_one_context_has_nothing_to_learn_where_only_differences_between_contexts_count(
    tmp_path: Path, model_folder: Path
) -> None:
    controlled = {"train__preference__estimate": "controlled"}
    whole = config_of(tmp_path, model_folder, **controlled, train__preference__common_weight=1.0)
    config = config_of(tmp_path, model_folder, **controlled, train__preference__common_weight=0.0)
    open_session(config)  # of several contexts
    letters = load_decisions(config.data.set)
    letters.select(lambda decision: decision.context == letters[0].context).write_jsonl(config.data.set)
    with pytest.raises(ConfigError, match="common_weight: at 0 only differences .* in one context; set it to 1"):
        open_session(config)
    open_session(whole)


def test_resolved_configs_are_written_whole(run: tuple[TrainConfig, Result]) -> None:
    config, result = run
    assert (result.folder / "config.yaml").read_text() == resolved_yaml(config)
