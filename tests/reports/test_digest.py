"""A method's seeds as one row, who is ahead, and what the summary says."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from studies import study

from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.study import Study
from dso.reports.digest import digests, figures_of, over_seeds
from dso.reports.tables import (
    by_layer,
    capability_rows,
    curve_rows,
    layer_rows,
    method_rows,
    seconds_text,
    spillover_rows,
    trial_rows,
)
from dso.reports.words import ahead, figure_text, summary, trouble_lines

NAN = math.nan


def test_seeds_are_their_mean_with_the_widest_interval() -> None:
    seeds = [Estimate(0.2, 0.1, 0.3), Estimate(0.4, 0.25, 0.7), UNMEASURED]
    assert over_seeds(seeds) == pytest.approx((0.3, 0.1, 0.7))
    assert over_seeds(seeds[:1]) == seeds[0]
    assert over_seeds([Estimate(1.0, NAN, NAN), Estimate(3.0, NAN, NAN)]) == (2.0, 1.0, 3.0)
    open_below = over_seeds([Estimate(0.2, NAN, 0.3), Estimate(0.4, 0.25, 0.7)])
    assert math.isnan(open_below.low)
    assert open_below.high == 0.7
    assert math.isnan(over_seeds([]).value)


def test_figures_are_shown_to_their_last_sure_digit() -> None:
    assert figure_text("bias", Estimate(0.0312, 0.02, 0.05)) == "0.031 [0.020, 0.050]"
    assert figure_text("cut", Estimate(0.83, 0.71, 0.9)) == "83% [71, 90]"
    assert figure_text("perplexity", Estimate(-0.012, -0.02, NAN)) == "-1.2% [-2.0, -]"
    assert figure_text("order", Estimate(0.4, NAN, NAN)) == "0.40"
    assert figure_text("mass", Estimate(1.081, 1.080, 1.082)) == "1.08"
    assert figure_text("kl", UNMEASURED) == "-"


def test_a_rival_is_ahead_by_what_the_table_shows() -> None:
    found = {digest.method.name: digest for digest in digests(study())}
    lora, ours = found["lora"], found["ours"]
    assert ours.scales == (2.0,)
    assert lora.ahead == ()  # at its chosen scale of 1
    assert found["projection"].ahead == ("neutral_kl", "perplexity")
    assert found["null"].ahead == ()  # doing nothing costs nothing
    assert found["published"].ahead == ("accuracy",)
    assert ahead(study()).keys() == {"Ahead on a cost alone"}


def test_a_rival_that_is_ahead_on_bias_comes_first() -> None:
    made = study()
    methods = [
        replace(method, trials=tuple(replace(trial, chosen=2.0) for trial in method.trials))
        if method.name == "lora"
        else method
        for method in made.methods
    ]
    lines = ahead(replace(made, methods=tuple(methods)))
    assert [*lines] == ["Ahead on bias and on a cost", "Ahead on a cost alone"]
    (line,) = lines["Ahead on bias and on a cost"]
    assert line.startswith("LoRA, same objective: bias 0.0")
    assert "against 0.020 (intervals overlap); bias in log-odds" in line
    assert "accuracy 0.8" in line


def test_the_summary_says_how_much_how_sure_and_at_what_cost() -> None:
    text = " ".join(summary(study()))
    for part in (
        "dso (this config) at scale 2, chosen on validation, takes the bias from 0.186 [0.168, 0.204] to 0.020",
        "lies above 0 in 3 of 3 seeds",
        "Random directions, drawn 10 times, cut 2%",
        "on neutral texts 0.023 nats of KL",
        "the order effect went from 0.38 to 0.40; of 3 figures of bias about other attributes, it grew for religion",
    ):
        assert part in text
    made = study(spillover={})
    assert "the bias about other attributes was not measured" in summary(made)[-1]


def test_nothing_of_ours_inside_the_limits_is_said() -> None:
    made = study()
    ours, *others = made.methods
    trials = tuple(replace(trial, chosen=None, why="scale 0.5 broke KL") for trial in ours.trials)
    made = replace(made, methods=(replace(ours, trials=trials), *others))
    assert summary(made)[0].startswith("dso (this config): none inside the limits: scale 0.5 broke KL.")
    assert ahead(made) == {}
    assert summary(replace(made, methods=tuple(others)))[0].startswith("The study trains no steering of its own")


def test_no_method_and_no_seed_is_left_out() -> None:
    made = study()
    rows = method_rows(made)
    assert [row.title for row in rows] == ["Base model", *(method.title for method in made.methods)]
    trouble = {row.title: row.trouble for row in rows if row.trouble}
    assert trouble == {
        "FairSteer": "failed: no layer separates the groups: best accuracy 0.53 < 0.60",
        "Self-debiasing, reprompting": "none inside the limits: scale 1 broke accuracy: 0.61 < 0.69",
    }
    assert len(trouble_lines(made)) == 2
    assert len(trial_rows(made)) == 1 + 14 * 3 + 1 + 10  # the base, three seeds each, the failed one, the null's draws
    assert len(curve_rows(made)) == 2 + 12 * 3 * 4 + 2 * 3 + 10 * 4
    partly = made.methods[0].trials
    ours = replace(made.methods[0], trials=(replace(partly[0], chosen=None, why="broke KL"), *partly[1:]))
    lines = trouble_lines(replace(made, methods=(ours,)))
    assert lines == ["dso (this config): 1 of 3 seeds had nothing inside the limits: broke KL."]
    assert method_rows(replace(made, methods=(ours,)))[1].seed == "2 of 3"


def test_layers_add_up_their_sites() -> None:
    sites = {
        "model.layers.1.a": {"layer": 1, "coefficients": 10, "nonzero": 5, "norm": 3.0},
        "model.layers.1.b": {"layer": 1, "coefficients": 30, "nonzero": 5, "norm": 4.0},
        "model.norm": {"layer": -1, "coefficients": 8, "nonzero": 8, "norm": 1.0},
    }
    made = study(sparsity=sites)
    assert by_layer(made)[1] == {"coefficients": 40.0, "nonzero": 10.0, "norm": 5.0}
    assert layer_rows(made)[1:] == [("1", "40", "10", "25%", "5.000"), ("other", "8", "8", "100%", "1.000")]


def test_other_attributes_and_times() -> None:
    assert spillover_rows(study())[3][0] == "religion"
    assert spillover_rows(study())[3][-1] == "grew"
    assert spillover_rows(study(spillover={})) == []
    assert capability_rows(study())[1] == (
        "arc",
        "accuracy",
        "0.5",
        "50.0 [44.4, 55.6]",
        "50.5 [45.4, 56.6]",
        "0.5 [-2.4, 4.4]",
    )
    assert capability_rows(study(capability=())) == []
    assert [seconds_text(s) for s in (41.6, 200, 3900, NAN)] == ["42 s", "3 min 20 s", "1 h 5 min", "-"]


def test_a_study_comes_back_from_json() -> None:
    made = study()
    record = made.to_json()
    assert Study.from_json(json.loads(json.dumps(record))).to_json() == record
    assert figures_of(made.base, made.base)["mass"].value == 1.0
