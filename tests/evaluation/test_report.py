"""Records, tables, the picture and the model card of a scale curve."""

from __future__ import annotations

import json
import math
import struct
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import yaml

from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.evaluation.bias import BiasParts, BiasReport, accuracy, bias_report
from dso.evaluation.card import model_card
from dso.evaluation.comparison import Cuts, cut_text
from dso.evaluation.figure import scale_figure
from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.report import ScalePoint, contexts_table, markdown_table, scale_table
from dso.steering.config import SteeringConfig


def parts(size: float, **changes) -> BiasParts:
    values = {
        "bias": Estimate(size, max(0.0, size - 0.03), size + 0.03),
        "context_part": Estimate(size + 0.01, size, size + 0.02),
        "common_part": Estimate(-0.02, -0.05, 0.01),
        "gap": Estimate(0.1, -0.1, 0.3),
        "square": size**2,
        "evident": size**2,
    }
    return BiasParts(**(values | changes))


def bias(size: float, **changes) -> BiasReport:
    values = {
        "probability": parts(size),
        "log_odds": parts(2 * size),
        "order_effect": 0.4 + size,
        "paper": size + 0.04,
        "paper_fair": 0.05,
        "abstention": 0.0,
        "target": {"female": 0.5, "male": 0.5},
        "preferences": {
            "nurse": {"female": 0.5 + size, "male": 0.5 - size},
            "smith": {"female": 0.45, "male": 0.55},
            "clerk": {"female": 0.5, "male": 0.5},
        },
        "context_bias": {"nurse": 2 * size, "smith": 0.1, "clerk": 0.0},
        "n_decisions": 384,
        "n_contexts": 3,
        "n_units": 64,
    }
    return BiasReport(**(values | changes))


def share(value: float) -> Estimate:
    return Estimate(value, value - 0.1, value + 0.05)


def cut(value: float, **changes) -> Cuts:
    values = {"bias": share(value), "context_part": share(value), "gap": None, "log_odds": share(value - 0.2)}
    return Cuts(**(values | {"context_part_log_odds": share(value - 0.3)} | changes))


def point(scale: float, size: float, **changes) -> ScalePoint:
    values = {
        "scale": scale,
        "bias": bias(size),
        "accuracy": Estimate(0.8, 0.75, 0.85),
        "answer_mass": 0.4 + 0.1 * scale,
        "kl": 0.1 * scale,
        "kl_unambiguous": 0.2 * scale,
        "cut": cut(1 - size / 0.3) if scale else None,
    }
    return ScalePoint(**(values | changes))


@pytest.fixture
def points() -> list[ScalePoint]:
    return [point(1.0, 0.02), point(0.0, 0.3), point(0.5, 0.1)]


@pytest.fixture
def config() -> SteeringConfig:
    return SteeringConfig(
        sites={"model.layers.0.input_layernorm": 576, "model.norm": 576},
        fingerprint="ab12" * 16,
        base_model="org/base-model",
        revision="main",
        groups=("female", "male"),
        target=(0.5, 0.5),
        scale_range=(0.0, 1.5),
    )


def card(config, points, **changes) -> str:
    facts = {"name": "hiring", "data": "a test set", "training": {"decisions": 1600, "a|b": "c\nd"}}
    return model_card(config, points, **(facts | changes))


def test_round_trip_through_json(points):
    for original in points:
        assert ScalePoint.from_json(json.loads(json.dumps(original.to_json()))) == original


def test_round_trip_of_a_measured_report():
    candidates = (Candidate(text=" a", group="f"), Candidate(text=" b", group="m"))
    asked = [
        Decision(id=f"{c}{u}", context=c, kind="ambiguous", prompt="x", candidates=candidates, unit=f"u{u}")
        for c in "xy"
        for u in range(4)
    ]
    decisions = DecisionSet(tuple(asked))
    probs = np.tile([0.7, 0.3], (8, 1))
    measured = ScalePoint(
        scale=0.0, bias=bias_report(probs, decisions), accuracy=accuracy(probs, decisions), answer_mass=0.5, kl=0.0
    )
    again = ScalePoint.from_json(json.loads(json.dumps(measured.to_json())))
    assert again.bias == measured.bias
    assert again.bias.gap is None and math.isnan(again.accuracy.low)


def test_what_was_not_measured_is_null_and_comes_back_as_nan():
    original = point(0.3, 0.1, accuracy=UNMEASURED, kl=math.nan, bias=bias(0.1, probability=parts(0.1, gap=None)))
    text = json.dumps(original.to_json(), allow_nan=False)
    again = ScalePoint.from_json(json.loads(text))
    assert math.isnan(again.kl) and all(math.isnan(part) for part in again.accuracy)
    assert again.bias == original.bias


def test_short_record_has_no_contexts():
    record = point(0.0, 0.3).to_json(contexts=False)
    assert "nurse" not in json.dumps(record)
    again = ScalePoint.from_json(record)
    assert again.bias == bias(0.3, preferences={}, context_bias={})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("kl"), "a scale point lacks kl"),
        (lambda r: r.update(k1=0.0), "unknown key.* k1; known are"),
        (lambda r: r.update(scale="0"), "scale must be a number or null, found '0'"),
        (lambda r: r.update(accuracy=[0.1, 0.2]), r"accuracy must be \[value, low, high\]"),
        (lambda r: r["bias"].pop("paper"), "bias lacks paper"),
        (lambda r: r["bias"]["log_odds"].pop("gap"), "bias.log_odds lacks gap"),
        (lambda r: r["cut"].update(bias=0.5), r"cut.bias must be \[value, low, high\], found 0.5"),
        (lambda r: r["bias"].update(n_units=1.5), "n_units must be a whole number"),
        (lambda r: r["bias"].update(target=[0.5, 0.5]), "target must be an object"),
        (lambda r: r["bias"]["preferences"].update(nurse={"female": "x"}), "preferences.nurse.female must be a number"),
        (lambda r: r.update(bias=None), "bias must be an object"),
    ],
)
def test_bad_record_is_refused_with_the_key(change, message):
    record = json.loads(json.dumps(point(1.0, 0.3).to_json()))
    change(record)
    with pytest.raises(ValueError, match=message):
        ScalePoint.from_json(record)


def test_scale_table(points):
    lines = scale_table(points).splitlines()
    assert lines[:11] == [
        "scale  bias [95%]            cut [95%]     log-odds [95%]        cut [95%]     order",
        "-----  --------------------  ------------  --------------------  ------------  -----",
        "0.00   0.300 [0.270, 0.330]  -             0.600 [0.570, 0.630]  -             0.70",
        "0.50   0.100 [0.070, 0.130]  67% [57, 72]  0.200 [0.170, 0.230]  47% [37, 52]  0.50",
        "1.00   0.020 [0.000, 0.050]  93% [83, 98]  0.040 [0.010, 0.070]  73% [63, 78]  0.42",
        "",
        "scale  context part [95%]    cut [95%]     accuracy [95%]        mass  KL     KL unamb.",
        "-----  --------------------  ------------  --------------------  ----  -----  ---------",
        "0.00   0.310 [0.300, 0.320]  -             0.800 [0.750, 0.850]  1.00  0.000  0.000",
        "0.50   0.110 [0.100, 0.120]  67% [57, 72]  0.800 [0.750, 0.850]  1.12  0.050  0.100",
        "1.00   0.030 [0.020, 0.040]  93% [83, 98]  0.800 [0.750, 0.850]  1.25  0.100  0.200",
    ]
    assert "384 decisions, 64 units" in scale_table(points)
    assert "\x1b" not in scale_table(points)
    assert max(map(len, lines)) <= 100


def test_markdown_table_has_the_same_cells(points):
    header, rule, first = markdown_table(points).splitlines()[:3]
    assert header.count("|") == rule.count("|") == first.count("|") == 13
    assert first.startswith("| 0.00 | 0.300 [0.270, 0.330] | - | 0.600 [0.570, 0.630] |")


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.83, 0.71, 0.9), "83% [71, 90]"),
        (Estimate(1.0, 0.6, 1.0), "over 60%"),
        (Estimate(0.997, 0.994, 1.0), "over 99%"),
        (Estimate(1.0, -0.2, 1.0), "- [-20, 100]"),
        (Estimate(1.0, math.nan, 1.0), "- [-, 100]"),
        (Estimate(0.4, math.nan, 0.8), "40% [-, 80]"),
        (Estimate(-0.1, -0.3, 0.05), "-10% [-30, 5]"),
        (Estimate(1.2, 1.05, 1.3), "120% [105, 130]"),  # a gap that turned to the other side
        (UNMEASURED, "-"),
        (None, "-"),
    ],
)
def test_no_cut_says_all_of_it_where_its_interval_reaches_further(estimate, text):
    assert cut_text(estimate) == text


def test_base_may_be_given_apart(points):
    only = [points[2]]
    assert scale_table(only, base=points[1]).splitlines()[6].split()[-3] == "1.12"
    with pytest.raises(ValueError, match=r"no point has scale 0.*scales are 0\.5"):
        scale_table(only)
    with pytest.raises(ValueError, match="measure at least one scale"):
        scale_table([])


def test_missing_numbers_are_dashes():
    unordered = bias(0.3, order_effect=math.nan)
    blank = point(0.0, 0.3, bias=unordered, accuracy=UNMEASURED, answer_mass=0.0, kl=math.nan)
    bias_row, cost_row = (scale_table([blank]).splitlines()[place].split() for place in (2, 6))
    assert bias_row[-2:] == ["-", "-"]
    assert cost_row[-4:] == ["-", "-", "-", "0.000"]


def test_contexts_table():
    text = contexts_table(bias(0.3), bias(0.02), top=2)
    before, after = text.split("largest bias after")
    assert "2 of 3 contexts with the largest bias before" in before
    assert [line.split()[0] for line in before.splitlines()[4:6]] == ["nurse", "smith"]
    assert [line.split()[0] for line in after.splitlines()[4:6]] == ["smith", "nurse"]
    assert "nurse    female 0.80  0.600        female 0.52  0.040" in before
    assert "smith    male 0.55" in after


def test_contexts_table_shows_the_group_above_its_fair_share():
    target = {"female": 0.8, "male": 0.2}
    report = bias(0.1, target=target, preferences={"nurse": {"female": 0.7, "male": 0.3}}, context_bias={"nurse": 0.2})
    assert "male 0.30" in contexts_table(report, report)


def test_contexts_that_only_abstain_come_last_or_not_at_all():
    silent = {"female": math.nan, "male": math.nan}
    after = bias(0.1, preferences={"nurse": silent}, context_bias={"nurse": math.nan, "smith": 0.1})
    text = contexts_table(bias(0.3), after)
    assert text.splitlines()[4].split() == ["nurse", "female", "0.80", "0.600", "-", "-"]
    assert "The 1 of 2 contexts with the largest bias after" in text


def test_contexts_table_without_contexts_is_refused():
    with pytest.raises(ValueError, match="stored without their contexts"):
        contexts_table(bias(0.1, context_bias={}), bias(0.1))


def test_names_cannot_steer_a_terminal_or_break_a_table():
    name = "\x1b[2Jnur|se\n"
    report = bias(0.1, preferences={name: {"female": 0.6, "male": 0.4}}, context_bias={name: 0.2})
    plain, marked = contexts_table(report, report), contexts_table(report, report, markdown=True)
    assert "\x1b" not in plain and "?[2Jnur|se?" in plain
    assert r"| ?[2Jnur\|se? | female 0.60 |" in marked


def png_size(data: bytes) -> tuple[int, int]:
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", data[16:24])


@pytest.mark.parametrize("budget", [None, 0.1])
def test_figure_is_one_wide_png(points, tmp_path, budget):
    scale_figure(points, tmp_path / "deep" / "scale.png", budget, title="A title")
    width, height = png_size((tmp_path / "deep" / "scale.png").read_bytes())
    assert width > 1600 and 2 < width / height < 4
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["scale.png"]


def test_figure_of_the_same_points_is_the_same_file(points, tmp_path):
    scale_figure(points, tmp_path / "a.png")
    scale_figure(points[::-1], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_figure_of_what_is_barely_measured(tmp_path):
    nothing = point(0.0, 0.3, accuracy=UNMEASURED, kl=math.nan, bias=bias(0.3, probability=parts(0.3, bias=UNMEASURED)))
    scale_figure([nothing], tmp_path / "one.png", kl_budget=0.0)
    png_size((tmp_path / "one.png").read_bytes())
    with pytest.raises(ValueError, match="measure at least one scale"):
        scale_figure([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_figure_without_matplotlib_names_the_extra(points, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'dso\[train\]'"):
        scale_figure(points, tmp_path / "scale.png")
    assert not list(tmp_path.iterdir())


def test_card_front_matter_is_what_the_hub_reads(config, points):
    _, front, body = card(config, points).split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "dso",
        "base_model": "org/base-model",
        "tags": ["dso", "steering", "activation-steering", "fairness", "bias"],
    }
    assert body.lstrip().startswith("# hiring\n")


@pytest.mark.parametrize(("name", "stated"), [("1e3", "1e3"), ("", None), ("/data/base", None), ("./base", None)])
def test_card_front_matter_states_no_folder(config, points, name, stated):
    front = card(replace(config, base_model=name), points).split("---\n")[1]
    assert yaml.safe_load(front).get("base_model") == stated


def test_card_states_evidence_target_training_and_limits(config, points):
    text = card(config, points, kl_budget=0.05, figure="scale.png", limits=["Chat was not measured."])
    assert markdown_table(points) in text
    assert contexts_table(points[1].bias, points[0].bias, markdown=True) in text
    flat = " ".join(text.split())
    assert "At scale 1: bias 0.020 [0.000, 0.050] (base model 0.300 [0.270, 0.330]), cut by 93% [83, 98];" in flat
    assert "in log-odds 0.040 [0.010, 0.070] (base model 0.600 [0.570, 0.630]), cut by 73% [63, 78];" in flat
    assert "order effect 0.42 (base model 0.70)" in flat
    assert "`ab12ab12ab12ab12`" in text and "2 modules of width 576" in text and "0 to 1.5" in text
    assert "| female | 0.5 |" in text
    assert "| decisions | 1600 |" in text and r"| a\|b | c?d |" in text
    assert "](scale.png)" in text
    assert "KL is above the training budget of 0.05 nats: 0.100 at scale 1." in text
    assert "KL on unambiguous decisions is above the training budget of 0.05 nats: 0.100 at scale 0.5, 0.200 at" in text
    assert "- Chat was not measured.\n" in text


def test_card_says_what_was_not_measured(config):
    blind = [
        point(0.0, 0.3, accuracy=UNMEASURED),
        point(1.0, 0.1, accuracy=UNMEASURED, bias=bias(0.1, abstention=0.25)),
    ]
    text = card(config, blind)
    assert "accuracy was not measured" in text
    assert "An abstaining answer has probability 0.250 at scale 1" in text
    assert "accuracy was not measured" not in card(config, [point(0.0, 0.3)])


def test_card_says_where_answers_follow_the_order_more_than_before(config):
    before = point(0.0, 0.3, bias=bias(0.3, order_effect=0.52))
    after = {found: point(1.0, 0.1, bias=bias(0.1, order_effect=found)) for found in (0.75, 0.5, math.nan)}
    text = card(config, [before, after[0.75]])
    assert "order of the people more than the base model's do (0.52): 0.75 at scale 1." in text
    for steered in (after[0.5], after[math.nan]):
        assert "follow the order" not in card(config, [before, steered])


def test_card_says_what_was_measured_beyond_its_limit(config):
    base = point(0.0, 0.3)
    after = point(1.0, 0.1, answer_mass=0.25, accuracy=Estimate(0.7, 0.65, 0.75), kl=0.15, kl_unambiguous=0.49)
    text = card(config, [base, after], kl_budget=0.2)
    assert "KL is above" not in text
    assert "KL on unambiguous decisions is above the training budget of 0.2 nats: 0.490 at scale 1." in text
    own = card(config, [base, after], kl_budget=0.1, unambiguous_kl=0.4)
    assert "KL is above the training budget of 0.1 nats: 0.150 at scale 1." in own
    assert "KL on unambiguous decisions is above the training budget of 0.4 nats: 0.490 at scale 1." in own
    assert "KL on unambiguous" not in card(config, [base, after], kl_budget=0.1, unambiguous_kl=0.5)
    assert "hold together falls, to 0.625 at scale 1 of the base model's" in text
    assert "Accuracy is below the base model's 0.800: 0.700 at scale 1." in text
    fine = card(config, [base, point(1.0, 0.1)], kl_budget=0.2)
    assert not any(words in fine for words in ("is above the training", "hold together falls", "Accuracy is below"))


def test_card_needs_the_base_model(config):
    with pytest.raises(ValueError, match="no point has scale 0"):
        card(config, [point(1.0, 0.1)])


def test_code_on_the_card_runs(config, points, monkeypatch):
    """The block is executed against stand-ins that record what it asks for."""
    calls = []

    class Handle:
        scale = None

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            calls.append("left")

        def detach(self):
            calls.append(("detached at", self.scale))

    class Steering:
        @classmethod
        def from_pretrained(cls, source):
            calls.append(source)
            return cls()

        def on(self, model, scale):
            calls.append(scale)
            return Handle()

        def attach(self, model, scale):
            return Handle()

    class Backbone:
        model = None

        @classmethod
        def load(cls, name, *, revision=None):
            calls.append((name, revision))
            return cls()

    block = card(config, points, source="runs/hiring").split("```python\n")[1].split("```")[0]
    body = block.replace("from dso import Backbone, Steering\n", "")
    assert body != block
    exec(textwrap.dedent(body), {"Backbone": Backbone, "Steering": Steering})
    assert calls == [("org/base-model", "main"), "runs/hiring", 0.4, "left", ("detached at", 1.5)]
