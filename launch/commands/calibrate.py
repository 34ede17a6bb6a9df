"""``dso calibrate``: find the scale that meets limits on validation, and write it into the steering.

Exit code 0: the scale is the steering's own from now on. 4: no scale meets the limits; nothing was written.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import replace

import numpy as np

from dso.decisions.decision import DecisionSet
from dso.errors import UserError
from dso.evaluation.bias import bias_report, right_answers
from dso.evaluation.calibration import Limits, Reading, calibrate
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.intervals import UNMEASURED, Estimate, mean_estimate
from dso.evaluation.neutral import NeutralTexts, neutral_texts
from dso.evaluation.report import MISSING, decimal_text, fixed_rows, interval_text
from dso.files import as_path, check_writable
from dso.models.backbone import Backbone
from dso.steering.checkpoint import CONFIG_FILE
from dso.steering.handle import Handle
from dso.steering.model import Steering
from launch.commands.common import load_backbone, open_split, quieten
from launch.exits import EXIT_UNMET

NAMES = {"bias": "bias", "kl": "KL", "accuracy_loss": "accuracy loss", "perplexity": "perplexity"}
HEADER = ("scale", "bias [95%]", "KL", "accuracy loss [95%]", "perplexity [95%]", "breaks")


def run(arguments: argparse.Namespace) -> int:
    """``dso calibrate``."""
    limits = _limits(arguments)
    place = arguments.out or arguments.steering
    if arguments.out is None and not as_path(place).is_dir():
        raise UserError(
            f"{arguments.steering}: is no folder, so the scale cannot be written there; name one with --out"
        )
    check_writable(as_path(place) / CONFIG_FILE)
    data = open_split(arguments.set, arguments)
    data.select(kind="ambiguous")
    if limits.accuracy_loss is not None:
        data.select(kind="unambiguous")
    quieten()
    steering = Steering.from_pretrained(arguments.steering)
    largest = steering.config.scale_range[1]
    if not largest > 0:
        raise UserError(f"{arguments.steering}: states no scale above 0, so there is none to choose")
    backbone = load_backbone(arguments, steering)
    handle = steering.to(backbone.device).attach(backbone.model, 0.0)
    measures = Measures(backbone, data, handle, limits, arguments)
    found = calibrate(measures.reading, limits, largest)
    handle.detach()
    print(fixed_rows([HEADER, *(_cells(reading, limits) for reading in found.readings)]))
    nearest = f"{found.nearest.scale:g}"
    if found.chosen is None:
        print(f"none does: no scale from 0 to {largest:g} meets the limits; the nearest is {nearest}, which breaks")
        for name, value in limits.broken(found.nearest).items():
            print(f"  {_judged(name)} {decimal_text(value)}, above {limits.given[name]:g}")
        return EXIT_UNMET
    steering.config = replace(steering.config, default_scale=found.chosen.scale)
    steering.save_pretrained(place)
    kind = (
        "the smallest scale that meets"
        if limits.bias is not None
        else "the largest scale up to which the steering meets"
    )
    print(f"{place}: its own scale is {nearest} from now on, {kind} the limits on {len(data)} decisions")
    return 0


def _limits(arguments: argparse.Namespace) -> Limits:
    limits = Limits(
        bias=arguments.max_bias,
        kl=arguments.max_kl,
        accuracy_loss=arguments.max_accuracy_loss,
        perplexity=arguments.max_perplexity,
    )
    if not limits.given:
        raise UserError("name a limit: --max-bias, --max-kl, --max-accuracy-loss or --max-perplexity")
    for name, value in limits.given.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"--max-{name.replace('_', '-')} {value:g}: expected a number from 0")
    return limits


class Measures:
    """A steering on a split, at any scale.

    Args:
        backbone: the model that ``handle`` is attached to.
        decisions: of the split.
        handle: the steering.
        limits: texts and unambiguous decisions are measured only where a limit asks for them.
        arguments: of the command.
    """

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        handle: Handle,
        limits: Limits,
        arguments: argparse.Namespace,
    ):
        kept = decisions if limits.accuracy_loss is not None else decisions.select(kind="ambiguous")
        self._evaluator = Evaluator(backbone, kept, handle, keep_reference=True)
        self._handle, self._limits = handle, limits
        self._bootstrap, self._quiet = arguments.bootstrap, arguments.quiet
        self._target = handle.steering.config.target_for(decisions.groups)
        self._texts = NeutralTexts(backbone, neutral_texts())
        self._base = self._evaluator.measure(0.0)

    def reading(self, scale: float) -> Reading:
        """The split at one scale."""
        if not self._quiet:
            print(f"dso: measuring scale {scale:g}", file=sys.stderr)
        decisions = self._evaluator.decisions
        measured = self._evaluator.measure(scale) if scale else self._base
        ambiguous = np.array([decision.ambiguous for decision in decisions])
        report = bias_report(measured.policy, decisions, self._target, self._bootstrap)
        loss = UNMEASURED
        if self._limits.accuracy_loss is not None:
            unit, before = right_answers(self._base.policy, decisions)
            loss = mean_estimate(unit, before - right_answers(measured.policy, decisions)[1])
        return Reading(scale, report.bias, float(measured.kl[ambiguous].mean()), loss, self._perplexity(scale))

    def _perplexity(self, scale: float) -> Estimate:
        if self._limits.perplexity is None:
            return UNMEASURED
        self._handle.scale = scale
        try:
            return self._texts.perplexity()
        finally:
            self._handle.scale = 0.0


def _cells(reading: Reading, limits: Limits) -> tuple[str, ...]:
    return (
        f"{reading.scale:g}",
        interval_text(reading.bias),
        decimal_text(reading.kl),
        interval_text(reading.accuracy_loss),
        interval_text(reading.perplexity),
        ", ".join(NAMES[name] for name in limits.broken(reading)) or MISSING,
    )


def _judged(name: str) -> str:
    return "bias, upper end of its interval," if name == "bias" else f"{NAMES[name]}"
