"""The figures of README.md and docs/results.md are those that docs/results keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of linear layers


def lines(page: str) -> list[str]:
    return (ROOT / page).read_text("utf-8").splitlines()


def result(name: str) -> Any:
    """What a file of docs/results holds."""
    return json.loads((ROOT / "docs/results" / name).read_text("utf-8"))


def kept(name: str) -> list[Mapping]:
    """What a benchmark wrote, the base model first."""
    base, *steered = result(name)["rows"]
    assert base["kl"] == 0 and [row["seed"] for row in steered] == [0, 1, 2]
    return [base, *steered]


def interval(found: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def cut(row: Mapping, name: str) -> str:
    """Never all of a bias: the interval stands beside it, and its ends are known."""
    if row.get("cut") is not None:
        _, low, high = row["cut"][name]
        assert low is not None and high < 0.995
    return share(row, name)


def share(row: Mapping, name: str) -> str:
    """A cut whose interval may reach to all of the bias; empty where none was measured."""
    return "" if row.get("cut") is None else percent(row["cut"][name])


def percent(found: Sequence[float | None]) -> str:
    value, low, high = ("-" if x is None else f"{x:.0%}" for x in found)
    return f"{value} [{low}, {high}]"


def line(row: Mapping, *cells: str) -> str:
    name = "base" if row["seed"] is None else f"seed {row['seed']}"
    return f"| {' | '.join([name, *cells])} |"


@pytest.mark.parametrize(
    ("page", "name"),
    [("README.md", "budgets.json"), ("docs/results.md", "budgets.json"), ("docs/results.md", "expected.json")],
)
def test_every_seed_is_shown_on_both_scales(page: str, name: str) -> None:
    base = kept(name)[0]
    for row in kept(name):
        probability, log_odds = row["bias"]["probability"], row["bias"]["log_odds"]
        cells = [interval(probability["bias"]), cut(row, "bias"), interval(log_odds["bias"]), cut(row, "log_odds")]
        cells += [f"{row['bias']['order_effect']:.2f}", interval(row["accuracy"])]
        cells += [f"{row['answer_mass'] / base['answer_mass']:.2f}", f"{row['kl']:.3f}"]
        assert line(row, *cells) in lines(page)


def test_the_parts_of_its_bias_are_shown() -> None:
    for row in kept("budgets.json"):
        probability, log_odds = row["bias"]["probability"], row["bias"]["log_odds"]
        cells = [interval(probability["context_part"]), cut(row, "context_part")]
        cells += [interval(probability["common_part"]), interval(probability["gap"])]
        cells += [interval(log_odds["context_part"]), f"{row['kl_unambiguous']:.3f}"]
        assert line(row, *cells) in lines("docs/results.md")


@pytest.mark.parametrize(
    "name", ["test-names", "test-templates", "test-people", "test-contexts", "pronouns", "type1-test", "type2-test"]
)
def test_sets_that_were_not_trained_on_are_shown(name: str) -> None:
    for row in kept(f"transfer-{name}.json"):
        order = row["bias"]["order_effect"]
        cells = [interval(row["bias"]["probability"]["context_part"]), share(row, "context_part")]
        cells += [share(row, "context_part_log_odds"), share(row, "bias"), "" if order is None else f"{order:.2f}"]
        assert line(row, *cells) in lines("docs/results.md")


def test_other_groups_and_sets_are_shown() -> None:
    base: Mapping = {}
    for row in result("sets.json")["rows"]:
        base = row if row["seed"] is None else base
        name = "base" if row is base else f"{row['estimator']}, seed {row['seed']}"
        order = row["bias"]["order_effect"]
        cells = [name, interval(row["bias"]["probability"]["context_part"])]
        cells += [share(row, each) for each in ("context_part", "context_part_log_odds", "bias")]
        mass = row["answer_mass"] / base["answer_mass"]
        cells += ["" if order is None else f"{order:.2f}", f"{mass:.2f}", f"{row['kl']:.3f}"]
        assert f"| {' | '.join(cells)} |" in lines("docs/results.md")


def test_what_bbq_says_of_the_base_model_is_shown() -> None:
    figures = result("bbq.json")["benchmarks"]["bbq"]["figures"]
    base = "{:.1f} [{:.1f}, {:.1f}]".format(*figures["bias, ambiguous"]["base"])
    assert f"its published bias score on ambiguous questions is {base} of 100" in " ".join(lines("docs/results.md"))


def test_sampled_answers_are_shown() -> None:
    rows = result("freeform.json")
    for name, row in zip(("base", "seed 0", "seed 1", "seed 2"), rows, strict=True):
        part, shown = (row.get("cut") or {}).get("context_part"), ""
        if part is not None:  # never all of it
            shown = percent(part) if part[0] < 0.995 else f"at least {part[1]:.0%}"
        bias = row["bias"]
        cells = [interval(bias["probability"]["gap"]), interval(bias["probability"]["context_part"]), shown]
        cells += [f"{bias['order_effect']:.2f}", f"{bias['abstention']:.2f}"]
        cells += [f"{row['accuracy'][0]:.3f}", f"{row['kl']:.3f}"]
        assert f"| {' | '.join([name, *cells])} |" in lines("docs/results.md")


def test_what_it_costs_elsewhere_is_shown() -> None:
    measured = result("harm.json")
    for row, name in zip(measured["rows"], ("base", "seed 0", "seed 1", "seed 2"), strict=True):
        points, change = row["points"], [100 * x for x in row["perplexity_change"]]
        cells = [f"{row['accuracy']:.3f}", "{:+.2f} [{:+.2f}, {:+.2f}]".format(*points)]
        cells += ["{:+.2f}% [{:+.2f}, {:+.2f}]".format(*change), f"{row['neutral_kl']:.3f}"]
        assert f"| {' | '.join([name, *cells])} |" in lines("docs/results.md")


def test_what_a_cut_to_the_strongest_slopes_costs_is_shown() -> None:
    rows = result("adapters.json")["rows"]
    for row in rows:
        parts = [row["bias"][scale]["context_part"] for scale in ("probability", "log_odds")]
        mass = row["answer_mass"] / rows[0]["answer_mass"]
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*part) for part in parts] + [f"{row['bias']['order_effect']:.2f}"]
        cells += [f"{row['accuracy'][0]:.3f}", f"{mass:.2f}", f"{row['kl']:.3f}", f"{row['kl_unambiguous']:.3f}"]
        assert f"| {' | '.join([row['slopes'], *cells])} |" in lines("docs/adapters.md")


BENCHMARKS = {
    "winobias": ("type1, gap", "type1, context part, log-odds", "type2, gap", "type2, context part, log-odds"),
    "winogenerated": ("correlation", "women's pronoun", "neutral pronoun"),
    "crows_pairs": ("score",),
    "stereoset": ("LMS", "SS", "ICAT"),
    "bbq": ("accuracy, ambiguous", "bias, ambiguous", "accuracy, disambiguated", "bias, disambiguated"),
}


def cells_of(row: Mapping) -> list[str]:
    """Base, steered and difference; one decimal in a row with large numbers."""
    found = [row[name] for name in ("base", "steered", "difference")]
    places = 1 if any(abs(end) >= 10 for ends in found for end in ends if end is not None) else 3
    texts = []
    for ends in found:
        value, low, high = ("-" if end is None else f"{round(end, places) + 0.0:.{places}f}" for end in ends)
        texts.append(value if low == high == "-" else f"{value} [{low}, {high}]")
    return texts


@pytest.mark.parametrize(("name", "figure"), [(name, each) for name, shown in BENCHMARKS.items() for each in shown])
def test_published_benchmarks_are_shown(name: str, figure: str) -> None:
    measured = result("benchmarks.json")
    cells = cells_of(measured["benchmarks"][name]["figures"][figure])
    assert f"| {' | '.join([f'{name}: {figure}', *cells])} |" in lines("docs/benchmarks.md")


def test_what_spilled_over_is_shown() -> None:
    measured = result("benchmarks.json")
    for row in measured["spillover"]["rows"]:
        name = f"{row['attribute']} ({row['benchmark']})"
        assert f"| {' | '.join([name, *cells_of(row)])} |" in lines("docs/benchmarks.md")
    assert not any(row["grew"] for row in measured["spillover"]["rows"])


def test_what_edits_of_weights_do_is_shown() -> None:
    found = result("editing.json")
    assert {row["places"] for row in found["rows"]} >= {"", "value", "mask", "random", "shuffled"}
    for row in found["rows"]:
        edit = (
            [f"{row['places']}, {row['weights']:,}", row["edit"], f"{row['alpha']:g}"] if row["weights"] else [""] * 3
        )
        cells = [row["target"], *edit]
        for name in ("roles", "pronouns"):
            cells += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[name]), f"{row[name + '_log_odds'][0]:+.2f}"]
        assert f"| {' | '.join([*cells, format(row['perplexity'], '.1f')])} |" in lines("docs/editing.md")
    for name, places in found["where"].items():
        total = sum(places["kinds"].values())
        groups = [range(first, first + 10) for first in (0, 10, 20)]
        shares = [sum(places["layers"].get(str(layer), 0) for layer in group) for group in groups]
        shares += [places["kinds"].get(kind, 0) for kind in KINDS]
        shown = [f"{share / total:.0%}" for share in shares]
        assert f"| {' | '.join([name, *shown])} |" in lines("docs/editing.md")


def trials(study: Mapping) -> Iterator[tuple[str, Mapping, Mapping, list[str]]]:
    """Each method and seed of a study: its name as shown, the trial, its shown point, the cells of its cuts."""
    for method in study["methods"]:
        for trial in method["trials"]:
            scales = [point["result"]["scale"] for point in trial["points"]]
            place = scales.index(trial["chosen"]) if trial["chosen"] is not None else len(scales) // 2
            point, name = trial["points"][place], method["title"] + ("" if trial["chosen"] is not None else "*")
            found = point["result"]["cut"]
            yield name, trial, point, [percent(found[key]) for key in ("context_part", "context_part_log_odds")]


def ending(study: Mapping, trial: Mapping, point: Mapping) -> list[str]:
    """What both tables of a study end with: answer mass, KL, neutral KL, perplexity, seconds."""
    found, change = point["result"], point["perplexity"][0]
    perplexity = "-" if change is None else f"{100 * change:+.1f}%"
    mass = f"{found['answer_mass'] / study['base']['result']['answer_mass']:.2f}"
    return [mass, f"{found['kl']:.3f}", f"{point['neutral_kl']:.3f}", perplexity, f"{trial['seconds']:.0f}"]


def test_every_rival_is_shown_at_the_scale_that_validation_chose() -> None:
    study = result("compare.json")
    assert {"ours", "affine-editing", "lora", "caa", "published", "random"} <= {m["name"] for m in study["methods"]}
    brief = 0
    for name, trial, point, cuts in trials(study):
        found, last = point["result"], ending(study, trial, point)
        order, accuracy = f"{found['bias']['order_effect']:.2f}", f"{found['accuracy'][0]:.3f}"
        cells = [name, str(trial["seed"]), f"{found['scale']:.2g}", *cuts, order, accuracy, *last]
        assert f"| {' | '.join(cells)} |" in lines("docs/results.md")
        brief += f"| {' | '.join([name, *cuts, order, accuracy, *last[2:4]])} |" in lines("README.md")
    assert brief >= 6


def test_every_rival_on_winobias_is_shown() -> None:
    study = result("compare-winobias.json")
    assert {"ours", "affine-editing", "lora", "caa", "published"} <= {m["name"] for m in study["methods"]}
    for name, trial, point, cuts in trials(study):
        found = point["result"]
        gap, scale = interval(found["bias"]["probability"]["gap"]), f"{found['scale']:.2g}"
        cells = [name, str(trial["seed"]), scale, *cuts, percent(found["cut"]["bias"]), gap]
        assert f"| {' | '.join([*cells, *ending(study, trial, point)])} |" in lines("docs/results.md")


def test_what_steering_costs_is_shown_and_within_its_aims() -> None:
    found = result("overhead.json")
    names = {"hooks": "hooks", "per row": "a scale a row", "merged": "merged", "lora": "as LoRA of PEFT, rank 16"}
    for name, shown in (names | {"base again": "the base model again"}).items():
        cells = [found[mode][phase][name] for mode in ("eager", "compiled") for phase in ("prefill", "decode")]
        text = " | ".join("{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**cell) for cell in cells)
        assert f"| {shown} | {text} |" in lines("docs/steering.md")
        most = {"hooks": 1.03, "per row": 1.05, "merged": 1.015}.get(name, 1.15)
        assert all(cell["ratio"] <= most for cell in cells)
    ratio = found["import"]["ratio"]
    assert f"takes {ratio:.2f} of the time of `import torch, transformers`." in " ".join(lines("docs/steering.md"))
    assert ratio <= 1.05
