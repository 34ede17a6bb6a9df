"""The tables of README.md and docs, from what docs/results keeps: ``python -m tools.figures`` writes them anew.

A table is known by its page, the heading above it and its place below that; its header stays as it is, its rows are
replaced. What pages say in words is theirs: read it again after a measurement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dso.files import write_text

ROOT = Path(__file__).parents[1]
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of linear layers
CUTS = ("context_part", "context_part_log_odds")
# The splits and sets of `python -m tools.bench transfer`.
TRANSFER = {
    "test-names": "unseen names, training templates",
    "test-templates": "training names, unseen templates",
    "test-people": "441 couples of rarer names, unseen templates",
    "test-contexts": "ten unseen occupations, unseen names and templates",
    "pronouns": 'pronouns: he or she after "The nurse said that"',
    "type1-test": "WinoBias, type 1, test",
    "type2-test": "WinoBias, type 2, test",
}
BENCHMARKS = {
    "winobias": (
        "type1, gap", "type1, context part", "type1, context part, log-odds",
        "type2, gap", "type2, context part", "type2, context part, log-odds", "type2, answer mass",
    ),
    "winogenerated": ("correlation", "women's pronoun", "neutral pronoun"),
    "crows_pairs": ("score", "difference in nats"),
    "stereoset": ("LMS", "SS", "ICAT"),
    "bbq": ("accuracy, ambiguous", "bias, ambiguous", "accuracy, disambiguated", "bias, disambiguated"),
}  # fmt: skip
# README shows one seed of these.
RIVALS = ("ours", "affine-editing", "lora", "projection", "caa", "published", "random")
OVERHEAD = {
    "hooks": "hooks",
    "per row": "a scale a row",
    "merged": "merged",
    "lora": "as LoRA of PEFT, rank 16",
    "base again": "the base model again",
}
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Where a table stands and what its rows are.

    Attributes:
        page: path from the root of the repository.
        heading: the line above it, however far.
        rows: its rows but for header and rule.
        place: which of the tables below the heading, from 0.
    """

    page: str
    heading: str
    rows: Callable[[], Iterator[list[str]]]
    place: int = 0


def result(name: str) -> Any:
    """What a file of docs/results holds."""
    return json.loads((ROOT / "docs/results" / name).read_text("utf-8"))


def three(found: Sequence[float]) -> str:
    """An estimate with its interval."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def percent(found: Sequence[float | None] | None) -> str:
    """A share with its interval, or its lower end where it seems to be whole; empty where none was measured."""
    if found is None:
        return ""
    if found[0] is not None and found[0] >= 0.995 and found[1] is not None:
        return f"at least {found[1]:.0%}"
    value, low, high = ("-" if x is None else f"{x:.0%}" for x in found)
    return f"{value} [{low}, {high}]"


def share(row: Row, name: str) -> str:
    """By how much a figure is cut; empty for the base model."""
    return "" if row.get("cut") is None else percent(row["cut"][name])


def named(row: Row) -> str:
    return "base" if row["seed"] is None else f"seed {row['seed']}"


def named_with_variant(row: Row) -> str:
    return "base" if row["seed"] is None else f"{row['variant']}, seed {row['seed']}"


def seeds(name: str) -> Iterator[list[str]]:
    """Every seed on both scales, and what it costs."""
    rows = result(name)["rows"]
    for row in rows:
        probability, log_odds = row["bias"]["probability"], row["bias"]["log_odds"]
        cells = [three(probability["bias"]), share(row, "bias"), three(log_odds["bias"]), share(row, "log_odds")]
        cells += [f"{row['bias']['order_effect']:.2f}", three(row["accuracy"])]
        yield [named(row), *cells, f"{row['answer_mass'] / rows[0]['answer_mass']:.2f}", f"{row['kl']:.3f}"]


def parts(name: str, label: Callable[[Row], str] = named) -> Iterator[list[str]]:
    """The parts of every seed's bias."""
    for row in result(name)["rows"]:
        probability, log_odds = row["bias"]["probability"], row["bias"]["log_odds"]
        cells = [three(probability["context_part"]), share(row, "context_part")]
        cells += [three(probability["common_part"]), three(probability["gap"]), three(log_odds["context_part"])]
        yield [label(row), *cells, f"{row['kl_unambiguous']:.3f}"]


def transfer() -> Iterator[list[str]]:
    """Sets that were not trained on."""
    for name, title in TRANSFER.items():
        yield [f"**{title}**", *[""] * 5]
        for row in result(f"transfer-{name}.json")["rows"]:
            yield [named(row), *_elsewhere(row)]


def sets() -> Iterator[list[str]]:
    """Other groups, sets and models that were trained on."""
    base: Row = {}
    for row in result("sets.json")["rows"]:
        if row["seed"] is None:
            base = row
            yield [f"**{'gemma3-270m, roles' if row['set'] == 'gemma3-270m' else row['set']}**", *[""] * 7]
        name = "base" if row is base else f"{row['estimator']}, seed {row['seed']}"
        yield [name, *_elsewhere(row), f"{row['answer_mass'] / base['answer_mass']:.2f}", f"{row['kl']:.3f}"]


def _elsewhere(row: Row) -> list[str]:
    order = row["bias"]["order_effect"]
    cuts = [share(row, name) for name in (*CUTS, "bias")]
    return [three(row["bias"]["probability"]["context_part"]), *cuts, "" if order is None else f"{order:.2f}"]


def sampled() -> Iterator[list[str]]:
    """Free-form answers."""
    for name, row in zip(("base", "seed 0", "seed 1", "seed 2"), result("freeform.json"), strict=True):
        part = (row.get("cut") or {}).get("context_part")
        bias = row["bias"]
        cells = [three(bias["probability"]["gap"]), three(bias["probability"]["context_part"]), percent(part)]
        cells += [f"{bias['order_effect']:.2f}", f"{bias['abstention']:.2f}"]
        yield [name, *cells, f"{row['accuracy'][0]:.3f}", f"{row['kl']:.3f}"]


def elsewhere() -> Iterator[list[str]]:
    """ARC-Easy, its texts, prose and neutral texts, with the steerings as they are and turned to half."""
    names = ("base", *(f"seed {seed}{turned}" for seed in range(3) for turned in ("", ", scale 0.5")))
    for name, row in zip(names, result("harm.json")["rows"], strict=True):
        cells = [f"{row['accuracy']:.3f}", "{:+.2f} [{:+.2f}, {:+.2f}]".format(*row["points"])]
        cells += [change(row[what], 2) for what in ("perplexity_change", "prose_change")]
        yield [name, *cells, f"{row['neutral_kl']:.3f}"]


def change(ends: Sequence[float | None], places: int) -> str:
    """A relative change in percent with its interval, if it has one; empty where nothing was measured."""
    shown = [f"{100 * end:+.{places}f}" for end in ends if end is not None]
    if not shown:
        return ""
    value, *interval = shown
    return f"{value}% [{', '.join(interval)}]" if interval else f"{value}%"


def slopes() -> Iterator[list[str]]:
    """A cut to the strongest slopes."""
    rows = result("adapters.json")["rows"]
    for row in rows:
        cells = [three(row["bias"][scale]["context_part"]) for scale in ("probability", "log_odds")]
        cells += [f"{row['bias']['order_effect']:.2f}", f"{row['accuracy'][0]:.3f}"]
        cells += [f"{row['answer_mass'] / rows[0]['answer_mass']:.2f}", f"{row['kl']:.3f}"]
        yield [row["slopes"], *cells, f"{row['kl_unambiguous']:.3f}"]


def benchmarks() -> Iterator[list[str]]:
    """Published benchmarks."""
    measured = result("benchmarks.json")["benchmarks"]
    for name, shown in BENCHMARKS.items():
        for figure in shown:
            yield [f"{name}: {figure}", *_paired(measured[name]["figures"][figure])]


def spillover() -> Iterator[list[str]]:
    """The bias about every other attribute."""
    for row in result("benchmarks.json")["spillover"]["rows"]:
        yield [f"{row['attribute']} ({row['benchmark']})", *_paired(row)]


def _paired(row: Row) -> list[str]:
    """Base, steered and difference; one decimal in a row with large numbers."""
    found = [row[name] for name in ("base", "steered", "difference")]
    places = 1 if any(abs(end) >= 10 for ends in found for end in ends if end is not None) else 3
    texts = []
    for ends in found:
        value, low, high = ("-" if end is None else f"{round(end, places) + 0.0:.{places}f}" for end in ends)
        texts.append(value if low == high == "-" else f"{value} [{low}, {high}]")
    return texts


def editing() -> Iterator[list[str]]:
    """Edits of weights."""
    for row in result("editing.json")["rows"]:
        edit = (
            [f"{row['places']}, {row['weights']:,}", row["edit"], f"{row['alpha']:g}"] if row["weights"] else [""] * 3
        )
        cells = [row["target"], *edit]
        for name in ("roles", "pronouns"):
            cells += ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*row[name]), f"{row[name + '_log_odds'][0]:+.2f}"]
        yield [*cells, format(row["perplexity"], ".1f")]


def edited() -> Iterator[list[str]]:
    """Where the chosen weights sit."""
    for name, places in result("editing.json")["where"].items():
        total = sum(places["kinds"].values())
        groups = [range(first, first + 10) for first in (0, 10, 20)]
        found = [sum(places["layers"].get(str(layer), 0) for layer in group) for group in groups]
        found += [places["kinds"].get(kind, 0) for kind in KINDS]
        yield [name, *(f"{each / total:.0%}" for each in found)]


def shown_trials(methods: Iterable[Row]) -> Iterator[tuple[str, Row, Row, list[str]]]:
    """Each method and seed: its name as shown, the trial, its shown point, the cells of its cuts."""
    for method in methods:
        for trial in method["trials"]:
            scales = [point["result"]["scale"] for point in trial["points"]]
            place = scales.index(trial["chosen"]) if trial["chosen"] is not None else len(scales) // 2
            name = method["title"] + ("" if trial["chosen"] is not None else "*")
            point = trial["points"][place]
            yield name, trial, point, [percent(point["result"]["cut"][key]) for key in CUTS]


def ending(study: Row, trial: Row, point: Row) -> list[str]:
    """What both tables of a study end with: answer mass, KL, neutral KL, perplexity, seconds."""
    found = point["result"]
    mass = f"{found['answer_mass'] / study['base']['result']['answer_mass']:.2f}"
    return [
        mass,
        f"{found['kl']:.3f}",
        f"{point['neutral_kl']:.3f}",
        change(point["perplexity"], 1),
        f"{trial['seconds']:.0f}",
    ]


def rivals() -> Iterator[list[str]]:
    """Every method and seed on ``roles``, at the scale that validation chose."""
    study = result("compare.json")
    yield ["base", "", "0", "", "", *_order_and_accuracy(study["base"]["result"]), "1.00", "0.000", "0.000", "", ""]
    for name, trial, point, cuts in shown_trials(study["methods"]):
        found = point["result"]
        cells = [name, str(trial["seed"]), f"{found['scale']:.2g}", *cuts, *_order_and_accuracy(found)]
        yield [*cells, *ending(study, trial, point)]


def rivals_in_brief() -> Iterator[list[str]]:
    """Seed 0 of some, the least biased first but for the published and the null."""
    study = result("compare.json")
    yield ["base", "", "", *_order_and_accuracy(study["base"]["result"]), "0.000", ""]
    by_name = {method["name"]: method for method in study["methods"]}
    for name, trial, point, cuts in shown_trials(by_name[rival] for rival in RIVALS):
        if trial["seed"] == 0:
            yield [name, *cuts, *_order_and_accuracy(point["result"]), *ending(study, trial, point)[2:4]]


def _order_and_accuracy(found: Row) -> list[str]:
    return [f"{found['bias']['order_effect']:.2f}", f"{found['accuracy'][0]:.3f}"]


def rivals_on_winobias() -> Iterator[list[str]]:
    """The same on WinoBias, which has a gap and no order."""
    study = result("compare-winobias.json")
    gap = three(study["base"]["result"]["bias"]["probability"]["gap"])
    yield ["base", "", "0", "", "", "", gap, "1.00", "0.000", "0.000", "", ""]
    for name, trial, point, cuts in shown_trials(study["methods"]):
        found = point["result"]
        cells = [name, str(trial["seed"]), f"{found['scale']:.2g}", *cuts, percent(found["cut"]["bias"])]
        yield [*cells, three(found["bias"]["probability"]["gap"]), *ending(study, trial, point)]


def overhead() -> Iterator[list[str]]:
    """What steering costs in time."""
    found = result("overhead.json")
    for name, shown in OVERHEAD.items():
        cells = [found[mode][phase][name] for mode in ("eager", "compiled") for phase in ("prefill", "decode")]
        yield [shown, *("{ratio:.3f} [{low:.3f}, {high:.3f}]".format(**cell) for cell in cells)]


TABLES = (
    Table("README.md", "## Results", lambda: seeds("budgets.json")),
    Table("README.md", "### Against its rivals", rivals_in_brief),
    Table("docs/results.md", "## The default run", lambda: seeds("budgets.json")),
    Table("docs/results.md", "## The default run", lambda: parts("budgets.json"), 1),
    Table("docs/settings.md", "## Blocks weighted", lambda: parts("blocks.json", named_with_variant), 1),
    Table("docs/rivals.md", "## On roles", rivals),
    Table("docs/rivals.md", "## On WinoBias", rivals_on_winobias),
    Table("docs/results.md", "## Against the expected reward", lambda: seeds("expected.json")),
    Table("docs/results.md", "## What it was not trained on", transfer),
    Table("docs/results.md", "## Other groups and sets", sets),
    Table("docs/results.md", "## Sampled answers", sampled),
    Table("docs/results.md", "## Where nothing should move", elsewhere),
    Table("docs/adapters.md", "| slopes a site", slopes),
    Table("docs/benchmarks.md", "## Figures", benchmarks),
    Table("docs/benchmarks.md", "## Figures", spillover, 1),
    Table("docs/editing.md", "## What it does to a small model", editing),
    Table("docs/editing.md", "## What it does to a small model", edited, 1),
    Table("docs/steering.md", "## What it costs", overhead),
)


def filled(lines: list[str], table: Table) -> list[str]:
    """The lines of a page with a table's rows as they should be.

    Raises:
        ValueError: if the page has no such heading, or no such table below it.
    """
    places = [place for place, line in enumerate(lines) if line.startswith(table.heading)]
    if len(places) != 1:
        raise ValueError(f"{table.page}: {len(places)} lines begin with {table.heading!r}, expected one")
    rules = [place for place in range(places[0], len(lines)) if lines[place].startswith("| ---")]
    if len(rules) <= table.place:
        raise ValueError(f"{table.page}: no table {table.place} below {table.heading!r}")
    start = end = rules[table.place] + 1
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return [*lines[:start], *(f"| {' | '.join(row)} |" for row in table.rows()), *lines[end:]]


def page(name: str) -> str:
    """A page with all of its tables as they should be."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    for table in TABLES:
        if table.page == name:
            lines = filled(lines, table)
    return "\n".join(lines) + "\n"


def main() -> None:
    for name in dict.fromkeys(table.page for table in TABLES):
        text = page(name)
        if text != (ROOT / name).read_text("utf-8"):
            write_text(ROOT / name, text)
            print(f"{name}: tables written anew; read what it says of them")


if __name__ == "__main__":
    main()
