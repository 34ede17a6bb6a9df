"""The estimators against each other, and against DSO as published: how soon bias halves, and what it costs in KL.

All is measured on validation: how soon a run learns is a property of training, and the test split stays unseen by it.
When it halves is told of the bias and of the gap between stereotypes. From the gap the names of a
couple cancel, as they are in contexts of either stereotype; on as few people as there is time for every few steps,
the bias of single contexts is noisier.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean

from dso.decisions.sets import load_decisions
from dso.evaluation.comparison import cut_text
from dso.evaluation.evaluator import Evaluator, Measurement
from dso.evaluation.intervals import UNMEASURED
from dso.evaluation.report import ScalePoint, fixed_rows, interval_text
from dso.files import write_text
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from dso.steering.model import Steering
from launch.run.measure import scale_point, thin
from launch.run.train import last_step
from launch.study.tuning import at_kl
from tools.bench.sweeps import Variant, train_all

CONFIG = "smollm2-estimators"
# Sampled answers, +1/-1 by the group that a context prefers in the batch, no unambiguous share; the price of KL is
# fixed in all of them.
PUBLISHED = (
    "train.estimator=reinforce",
    "train.reward=sign",
    "train.preference.hard=true",
    "train.preference.estimate=context",
    "train.preference.batch_weight=1.0",
    "train.baseline=none",
    "train.unambiguous=0",
    "train.optimizer.fisher_batches=0",
)
VARIANTS = (
    Variant("expected", ()),
    Variant("reinforce", ("train.estimator=reinforce",)),
    Variant("ppo", ("train.estimator=ppo", "train.ppo.n_epochs=2")),
    Variant("published", PUBLISHED),
)
HALVED = ("bias", "gap")
COLUMNS = (
    *("estimator", "seed", "until bias halves", "until gap halves"),
    *("KL", "gap [95%]", "cut [95%]", "log-odds [95%]", "cut [95%]", "order", "accuracy"),
    *("last KL", "gap", "accuracy"),
)


def estimators(arguments: argparse.Namespace) -> None:
    """Decisions until bias and gap first halve on validation, and what is left at equal KL, by estimator and seed."""
    folders = train_all(CONFIG, VARIANTS, arguments)
    data = thin(load_decisions("roles", splits=["validation"]).select(split="validation"), arguments.stride)
    backbone = Backbone.load(Steering.from_pretrained(folders[0][2] / "steering").config.base_model)
    evaluator = Evaluator(backbone, data, keep_reference=True)
    plain, rows = evaluator.measure(0.0), []
    base = scale_point(0.0, plain, data, None, 1000)
    for name, seed, folder in folders:
        history = [row for row in json.loads((folder / "validation.json").read_text()) if row["scale"] == 1]
        with last_step(folder).to(backbone.device).on(backbone.model, 0.0) as handle:
            found = _at_kl(lambda scale, handle=handle: _point(evaluator, handle, scale, plain), arguments.kl)
        halved = {key: decisions_until(history, key, 0.5) for key in HALVED}
        at_equal_kl = found.to_json(contexts=False)
        rows.append({"variant": name, "seed": seed, "halved_at": halved, "at_kl": at_equal_kl, "history": history})
    record = {"kl": arguments.kl, "base": base.to_json(contexts=False), "rows": rows}
    write_text(Path(arguments.results) / "estimators.json", json.dumps(record, indent=1) + "\n")
    print(table(record), end="")


def _at_kl(measure: Callable[[float], ScalePoint], wanted: float) -> ScalePoint:
    """A steering at the scale at which its mean KL on ambiguous decisions is ``wanted``, or at 1 if it has less."""
    seen: dict[float, ScalePoint] = {}
    return seen[at_kl(lambda scale: seen.setdefault(scale, measure(scale)).kl, wanted, highest=1.0)]


def _point(evaluator: Evaluator, handle: Handle, scale: float, base: Measurement) -> ScalePoint:
    measured = evaluator.settings([(handle, scale)])[0]
    return scale_point(scale, measured, evaluator.decisions, None, 1000, base)


def decisions_until(history: Sequence[dict], key: str, share: float) -> int | None:
    """Training decisions after which a figure was first at most ``share`` of the base's; None if it never was.

    It is taken to fall evenly from one validation to the next.
    """
    wanted, before = share * history[0][key], history[0]
    for row in history[1:]:
        if row[key] <= wanted:
            part = (before[key] - wanted) / (before[key] - row[key])
            return round(before["decisions"] + part * (row["decisions"] - before["decisions"]))
        before = row
    return None


def table(record: dict) -> str:
    """A fixed-width table: every run, each estimator's mean; "> N" where a run of N decisions never halved it."""
    rows, base, cells = record["rows"], record["base"], [COLUMNS]
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        for row in own:
            found, last = ScalePoint.from_json(row["at_kl"]), row["history"][-1]
            gap, log_odds = found.bias.gap or UNMEASURED, found.bias.log_odds.bias
            cuts = (found.cut.gap, found.cut.log_odds) if found.cut else (None, None)
            cells.append(
                (name, str(row["seed"]), _halved([row], "bias"), _halved([row], "gap"), f"{found.kl:.3f}")
                + (interval_text(gap), cut_text(cuts[0]), interval_text(log_odds), cut_text(cuts[1]))
                + (f"{found.bias.order_effect:.2f}", f"{found.accuracy.value:.3f}")
                + (f"{last['kl']:.3f}", f"{last['gap']:.3f}", f"{last['accuracy']:.3f}")
            )
        cells.append((name, "mean", _halved(own, "bias"), _halved(own, "gap"), *[""] * (len(COLUMNS) - 4)))
    at_zero = ScalePoint.from_json(base)
    gap, log_odds = interval_text(at_zero.bias.gap or UNMEASURED), interval_text(at_zero.bias.log_odds.bias)
    bias = f"gap {gap}, log-odds {log_odds}, order {at_zero.bias.order_effect:.2f}, accuracy {base['accuracy'][0]:.3f}"
    return f"base: {bias}; scaled to a KL of {record['kl']:g}, and as the last step left it\n{fixed_rows(cells)}"


def _halved(rows: Sequence[dict], key: str) -> str:
    """The mean of the decisions until ``key`` halved; where a run never did, of those it saw, as a lower bound."""
    seen = [row["history"][-1]["decisions"] if row["halved_at"][key] is None else row["halved_at"][key] for row in rows]
    return f"{'> ' if any(row['halved_at'][key] is None for row in rows) else ''}{mean(seen):,.0f}"
