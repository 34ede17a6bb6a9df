"""Local contrastive editing of three fine-tuned copies of a model: what it does to bias, and what it costs.

The copies are those of :mod:`tools.bench.finetuning`. Each row is a target, perhaps patched, on prompts, names and
templates that no fine-tuning saw: the stereotype gap on ``roles`` and on ``pronouns`` (he against she), on the scales
of probability and of log-odds, and the perplexity of neutral text. What is measured already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dso.decisions.decision import Candidate, DecisionSet
from dso.decisions.sets import load_decisions
from dso.decisions.sets.roles import STEREOTYPES
from dso.editing.edit import edited_values
from dso.editing.localise import Places, random_places
from dso.editing.make import make_patch, where
from dso.editing.patch import Patch
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.bias import bias_report
from dso.evaluation.layout import numbered
from dso.evaluation.neutral import neutral_texts
from dso.evaluation.report import fixed_rows
from dso.files import write_text
from dso.models.backbone import Backbone
from dso.models.loading import load_parts
from launch.commands.common import quieten
from tools.bench.finetuning import VARIANTS, tuned

GROUP = {"he": "male", "she": "female"}
ANY = {"scale_range": (-1000.0, 1000.0)}


@dataclass(frozen=True, slots=True)
class Setting:
    """One edit at several alphas.

    Attributes:
        places: ``value``, ``mask``, or of as many random ones: ``random``, or ``shuffled``, where the changes that the
            chosen weights get go to random ones, so that the sizes are the same, too.
        times: as many weights as are asked for.
    """

    target: str
    reference: str
    places: str
    edit: str
    alphas: tuple[float, ...]
    times: int = 1


SETTINGS = (
    Setting("stereotyped", "counter", "value", "extrapolate", (1.0, 2.0, 0.5, -1.0, 4.0)),
    Setting("stereotyped", "counter", "random", "extrapolate", (1.0, 4.0)),
    Setting("stereotyped", "counter", "shuffled", "extrapolate", (1.0, 4.0)),
    Setting("stereotyped", "counter", "value", "prune", (1.0,)),
    Setting("neutral", "stereotyped", "value", "extrapolate", (-1.0, 1.0, -2.0, -4.0)),
    Setting("stereotyped", "counter", "mask", "interpolate", (1.0,)),
    Setting("stereotyped", "counter", "mask", "switch", (1.0,)),
    Setting("stereotyped", "counter", "value", "extrapolate", (1.0,), times=10),
)


def editing(arguments: argparse.Namespace) -> None:
    """Every row, and where the weights that were chosen sit."""
    quieten()
    folders = {"base": arguments.model}
    folders |= {variant: str(tuned(arguments.model, variant, Path(arguments.folder))) for variant in VARIANTS}
    path = Path(arguments.results) / "editing.json"
    result = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": [], "where": {}}
    bench = Bench(arguments, folders, result, path)
    for name in folders:
        bench.whole(name)
    for setting in SETTINGS:
        bench.edited(setting)
    result["rows"].sort(key=place_of)
    write_text(path, json.dumps(result, indent=1) + "\n")
    print(fixed_rows([HEADER, *(cells(row) for row in result["rows"])]))


class Bench:
    """What is measured so far, and the model that is loaded.

    Args:
        arguments: of the command line.
        folders: the copies, by name.
        result: to add rows to.
        path: where it is kept.
    """

    def __init__(self, arguments: argparse.Namespace, folders: Mapping[str, str], result: dict[str, Any], path: Path):
        self.arguments, self.folders, self.result, self.path = arguments, folders, result, path
        self.sets = {"roles": couples(arguments.couples, arguments.stride), "pronouns": he_or_she()}
        self.texts = neutral_texts()[: arguments.texts]
        self._loaded = "", None

    def backbone(self, name: str) -> Backbone:
        """A copy; one at a time is in memory."""
        if self._loaded[0] != name:
            self._loaded = name, Backbone.load(self.folders[name])
        return self._loaded[1]

    def whole(self, name: str) -> None:
        """The row of a copy as it is."""
        if not self.has(target=name, edit="none"):
            self.add({"target": name, "reference": "", "places": "", "edit": "none", "alpha": 0.0, "weights": 0}, name)

    def edited(self, setting: Setting) -> None:
        """The rows of a setting."""
        about = {"target": setting.target, "reference": setting.reference}
        about |= {"places": setting.places, "edit": setting.edit, "times": setting.times}
        missing = [alpha for alpha in setting.alphas if not self.has(**about, alpha=alpha)]
        if not missing:
            return
        backbone = self.backbone(setting.target)
        reference = load_parts(self.folders[setting.reference], None, "float32")[0]
        patch = made(setting, backbone.model, reference, self.arguments.k)
        if setting.places in ("value", "mask"):
            key = f"{setting.target} to {setting.reference}, {setting.places}"
            key += f", {setting.times * self.arguments.k:g}" if setting.places == "value" else ""
            layers, kinds = where(patch.places)
            self.result["where"][key] = {"layers": dict(sorted(layers.items())), "kinds": dict(kinds.most_common())}
        del reference
        for alpha in missing:
            with patch.on(backbone.model, alpha):
                self.add({**about, "alpha": alpha, "weights": len(patch)}, setting.target)

    def has(self, **wanted: object) -> bool:
        """Whether a row is there."""
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.result["rows"])

    def add(self, about: dict[str, Any], name: str) -> None:
        """Measure the copy as it is now, and keep the row."""
        backbone = self.backbone(name)
        row = dict(about)
        for label, decisions in self.sets.items():
            row |= gaps(backbone, decisions, label)
        sums, tokens = Probe(backbone).likelihoods(self.texts, start=False)
        row["perplexity"] = math.exp(-sums.sum() / tokens.sum())
        self.result["rows"].append(row)
        write_text(self.path, json.dumps(self.result, indent=1) + "\n")
        print(*cells(row), sep="  ", flush=True)


@torch.no_grad()
def gaps(backbone: Backbone, decisions: DecisionSet, label: str) -> dict[str, Any]:
    """The stereotype gap with its interval, on both scales."""
    report = bias_report(backbone.score(list(decisions)).policy().exp().numpy(), decisions, bootstrap=0)
    return {label: list(report.gap), f"{label}_log_odds": list(report.log_odds.gap)}


def couples(number: int, stride: int) -> DecisionSet:
    """Ambiguous decisions of ``roles``' validation split; an odd stride leaves each couple both stereotypes."""
    options = {"splits": ["validation"], "units": {"validation": number}, "unambiguous": {"validation": 0}}
    data = load_decisions("roles", **options)
    # Not launch.run.measure.thin, whose rhythms connect all contexts and give a couple more of one stereotype.
    places = numbered([d.context for d in data])[1] + numbered([d.unit for d in data])[1]
    kept = {d.id for d, place in zip(data, places, strict=True) if place % stride == 0}
    return data.select(lambda d: d.id in kept)


def he_or_she() -> DecisionSet:
    """The validation split of ``pronouns`` without "they", and with the stereotypes of the occupations."""
    found = []
    for decision in load_decisions("pronouns", splits=["validation"]):
        kept = [Candidate(text=c.text, group=GROUP[c.group]) for c in decision.candidates if c.group in GROUP]
        found.append(replace(decision, candidates=tuple(kept), stereotype=STEREOTYPES[decision.context]))
    return DecisionSet(tuple(found), ("female", "male"), "pronouns")


def made(setting: Setting, target: nn.Module, reference: nn.Module, k: float) -> Patch:
    """The patch of a setting; the nulls have as many weights in each layer as the value-based one."""
    if setting.places in ("value", "mask"):
        return make_patch(target, reference, method=setting.places, edit=setting.edit, k=setting.times * k)
    chosen = make_patch(target, reference, k=setting.times * k)
    places = random_places(target, chosen.places)
    if setting.places == "random":
        return Patch.for_model(target, places, edited_values(setting.edit, target, reference, places), **ANY)
    own = edited_values(setting.edit, target, target, chosen.places)
    there = edited_values(setting.edit, target, target, places)
    return Patch.for_model(target, places, shuffled(there, chosen.values, own, places), **ANY)


def shuffled(
    there: Mapping[str, torch.Tensor],
    values: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    places: Places,
) -> dict[str, torch.Tensor]:
    """What weights at random places become if they get the changes that the chosen ones would, in random order."""
    drawn = torch.Generator().manual_seed(0)
    orders = {name: torch.randperm(len(index), generator=drawn) for name, index in places.items()}
    return {name: there[name] + (values[name] - own[name])[orders[name]] for name in places}


def place_of(row: Mapping[str, Any]) -> tuple[int, float]:
    """Where a row stands: the copies as they are, then setting by setting, by rising alpha."""
    if row["edit"] == "none":
        return -1, ("base", *VARIANTS).index(row["target"])
    kinds = [(s.target, s.places, s.edit, s.times) for s in SETTINGS]
    return kinds.index((row["target"], row["places"], row["edit"], row["times"])), row["alpha"]


HEADER = (
    "target",
    "reference",
    "weights",
    "edit",
    "alpha",
    "gap",
    "in log-odds",
    "pronouns",
    "in log-odds",
    "perplexity",
)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as the table shows it."""
    weights = f"{row['weights']:,} {row['places']}" if row["weights"] else ""
    gap = (interval(row[name]) for name in ("roles", "roles_log_odds", "pronouns", "pronouns_log_odds"))
    edit = "" if row["edit"] == "none" else row["edit"]
    alpha = f"{row['alpha']:g}" if edit else ""
    return row["target"], row["reference"], weights, edit, alpha, *gap, f"{row['perplexity']:.2f}"


def interval(found: Sequence[float]) -> str:
    """An estimate with its interval."""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*found)
