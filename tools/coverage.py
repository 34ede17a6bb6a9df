"""How often the intervals of bias hold the truth, by simulation and on real answers: ``python -m tools.coverage``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from dso.evaluation.bias import BiasParts, bias_parts
from dso.evaluation.intervals import Estimate, share_estimate
from dso.evaluation.twoway import Array, Cells, Mask, fit

REST = 0.15  # what is left of a cell, in the units of the other effects
FIGURES = ("bias", "context_part", "common_part", "gap")
SCALES = ("probability", "log-odds")


@dataclass(frozen=True, slots=True)
class Setting:
    """One simulated layout. Effects are sizes in log-odds over the number of groups: about those in probability.

    ``design`` is ``full`` (every unit in every context), ``thin`` (each in every third context), ``missing`` (three in
    ten cells are not there, other units in each context) or ``alone`` (every cell a unit of its own, in unequal numbers).
    """

    contexts: int
    units: int
    liking: float
    common: float
    groups: int = 2
    context: float = 0.1
    design: str = "full"


class Simulation:
    """Draws of people for one setting, and what is true of it on both scales."""

    DRAWS = 20_000

    def __init__(self, setting: Setting):
        self.setting = setting
        rng = np.random.default_rng([setting.contexts, setting.groups])
        effects = _centred(rng.standard_normal((setting.contexts, setting.groups)))
        effects -= effects.mean(axis=0)
        effects *= setting.context / _size(effects)
        common = _centred(np.eye(setting.groups)[0])
        self.log_odds = setting.groups * (effects + setting.common * common / _size(common))
        self.signs = np.sign(effects)
        self.seen = _seen(setting)
        noise = setting.groups * math.hypot(setting.liking, REST) / math.sqrt(2 * (setting.groups - 1))
        people = noise * np.random.default_rng(1).standard_normal((self.DRAWS, setting.groups))
        shares = [
            (_softmax(row + people) + _softmax(row - people)).mean(axis=0) / 2 for row in self.log_odds
        ]
        truths = np.stack(shares) - 1 / setting.groups, self.log_odds
        self.truths = [_figures(truth, self.signs) for truth in truths]

    def draw(self, rng: np.random.Generator) -> tuple[Cells, Cells]:
        """A sample of people: the cells in probability and in log-odds."""
        s = self.setting
        scale = s.groups / math.sqrt(2 * (s.groups - 1))
        unit, context = np.nonzero(self.seen)
        liking = s.liking * scale * rng.standard_normal((s.units, s.groups))[unit]
        log_odds = _centred(self.log_odds[context] + liking + REST * scale * rng.standard_normal((len(unit), s.groups)))
        if s.design == "alone":
            log_odds = _centred(
                self.log_odds[context] + math.hypot(s.liking, REST) * scale * rng.standard_normal((len(unit), s.groups))
            )
            unit = np.arange(len(unit))
        return (
            Cells(context, unit, _softmax(log_odds) - 1 / s.groups, s.contexts),
            Cells(context, unit, log_odds, s.contexts),
        )


def _seen(setting: Setting) -> Mask:
    unit, context = np.mgrid[: setting.units, : setting.contexts]
    if setting.design == "thin":
        return (unit + context) % 3 == 0
    if setting.design == "missing":
        kept = np.random.default_rng(2).random((setting.units, setting.contexts)) < 0.7
        kept[:2] = True
        return kept
    if setting.design == "alone":
        return unit < np.maximum(2, setting.units * (1 + context % 4) // 4)
    return np.ones(unit.shape, dtype=bool)


def _softmax(values: Array) -> Array:
    weights = np.exp(values - values.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _centred(values: Array) -> Array:
    return values - values.mean(axis=-1, keepdims=True)


def _size(theta: Array) -> float:
    return math.sqrt(2 * (np.atleast_2d(theta) ** 2).sum(axis=1).mean())


def _figures(theta: Array, signs: Array) -> dict[str, float]:
    mean = theta.mean(axis=0)
    two = theta.shape[1] == 2
    figures = {"bias": _size(theta), "context_part": _size(theta - mean)}
    figures["common_part"] = float(mean[0] - mean[1]) if two else _size(mean)
    return figures | ({"gap": float((signs * theta).sum(axis=1).mean())} if two else {})
