"""What each command of ``dso`` does."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

from tqdm import tqdm

from dso.decisions.decision import Decision, DecisionSet, check_target
from dso.decisions.describe import describe, show
from dso.decisions.sets import load_decisions
from dso.errors import UserError
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.figure import scale_figure
from dso.evaluation.report import contexts_table, scale_table
from dso.files import write_text
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.cli import EXIT_PREEMPTED, EXIT_STOPPED, is_main
from launch.config.reading import parse_yaml
from launch.config.schema import load_config
from launch.run.measure import scale_points
from launch.run.train import Stopped, report
from launch.run.train import train as train_run

__all__ = ["decisions", "evaluate", "freeform", "generate", "inspect", "train"]


def train(arguments: argparse.Namespace) -> int:
    """``dso train``."""
    config = load_config(arguments.config, arguments.overrides)
    quieten()
    if arguments.dry_run:
        from launch.estimate.dryrun import dry_run  # it needs what no other command does, and that takes a second

        print(dry_run(config, name=_run_name(arguments.config), deepspeed=arguments.deepspeed, ranks=arguments.ranks))
        return 0
    try:
        result = train_run(
            config,
            name=_run_name(arguments.config),
            resume="auto" if arguments.resume == "auto" else bool(arguments.resume),
            overwrite=arguments.overwrite,
            quiet=arguments.quiet,
            deepspeed=arguments.deepspeed,
        )
    except Stopped as stop:
        if is_main():
            print(f"dso: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
    if is_main():
        print(report(result))
    return 0


def freeform(arguments: argparse.Namespace) -> int:
    """``dso freeform``."""
    from launch.config.freeform import load_freeform
    from launch.run import freeform as run  # it needs what no other command does

    config, name = load_freeform(arguments.config, arguments.overrides), _run_name(arguments.config)
    quieten()
    if arguments.measure:
        print(run.measured(config, arguments.measure, arguments.quiet))
        return 0
    try:
        result = run.train(
            config, name=name, overwrite=arguments.overwrite, quiet=arguments.quiet, deepspeed=arguments.deepspeed
        )
    except Stopped as stop:
        if is_main():
            print(f"dso: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED if stop.preempted else EXIT_STOPPED
    if is_main():
        print(run.report(result))
    return 0


def evaluate(arguments: argparse.Namespace) -> int:
    """``dso evaluate``."""
    bare = arguments.steering == "none"
    scales = [0.0] if bare else sorted({0.0, *_numbers(arguments.scales)})
    data = load_decisions(arguments.set, **_pairs(arguments.option, "--option"))
    data = data.select(split=arguments.split)
    data.select(kind="ambiguous")
    shares = _pairs(arguments.target, "--target") or None
    check_target(shares, data.groups)
    quieten()
    steering = None if bare else Steering.from_pretrained(arguments.steering)
    if shares is None and steering is not None and {*steering.config.groups} == {*data.groups}:
        shares = dict(zip(steering.config.groups, steering.config.target, strict=True))  # what it was trained towards
    target = dict(zip(data.groups, check_target(shares, data.groups), strict=True))
    backbone = _backbone(arguments.model, steering)
    handle = steering.to(backbone.device).attach(backbone.model) if steering else None
    hidden = arguments.quiet or not sys.stderr.isatty()
    with tqdm(total=len(data) * len(scales), unit="decision", disable=hidden) as bar:
        evaluator = Evaluator(backbone, data, handle, progress=bar.update)
        points = scale_points(evaluator, scales, target, arguments.bootstrap)
    print(scale_table(points))
    if arguments.contexts:
        print(contexts_table(points[0].bias, points[-1].bias, arguments.contexts))
    if arguments.json:
        write_text(arguments.json, json.dumps([point.to_json() for point in points], indent=1))
    if arguments.figure:
        scale_figure(points, arguments.figure)
    return 0


def generate(arguments: argparse.Namespace) -> int:
    """``dso generate``."""
    quieten()
    steering = Steering.from_pretrained(arguments.steering)
    backbone = _backbone(arguments.model, steering)
    if not arguments.prompt.strip():
        raise UserError("the prompt is empty")
    if arguments.chat and not backbone.tokenizer.chat_template:
        raise UserError(f"the tokenizer of {backbone.name!r} has no chat template; leave --chat away")
    prompt = [{"role": "user", "content": arguments.prompt}] if arguments.chat else arguments.prompt
    with steering.to(backbone.device).on(backbone.model, arguments.scale):
        print(backbone.generate(prompt, max_new_tokens=arguments.max_new_tokens))
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """``dso inspect``."""
    steering = Steering.from_pretrained(arguments.steering)
    config = steering.config
    tensors = steering.tensors()
    total = sum(value.numel() for value in tensors.values())
    zero = sum(int((value == 0).sum()) for value in tensors.values())
    shares = ", ".join(f"{group} {share:.3g}" for group, share in zip(config.groups, config.target, strict=True))
    rank = f" of rank {config.rank}" if config.rank else ""
    revision = f" at {config.revision}" if config.revision else ""
    print(f"operator     {config.operator}{rank} at {len(config.sites)} sites")
    print(f"base model   {config.base_model}{revision}")
    print(f"fingerprint  {config.fingerprint[:16]}")
    print(f"fair shares  {shares}")
    print(f"scale        {config.scale_range[0]:g} to {config.scale_range[1]:g}")
    print(f"coefficients {total}, of which {zero} are exactly 0")
    norms = {
        site: {key: float(value.norm()) for key, value in operator.named_parameters()}
        for site, operator in steering.operators.items()
    }
    print("sites moved most:")
    for site in sorted(norms, key=lambda site: sum(norms[site].values()), reverse=True)[: arguments.top]:
        print(f"  {site:<44} {'  '.join(f'|{key}| {norm:.3f}' for key, norm in norms[site].items())}")
    return 0


def decisions(arguments: argparse.Namespace) -> int:
    """``dso decisions``."""
    data = load_decisions(arguments.set, **_pairs(arguments.option, "--option"))
    render = None
    if arguments.model:
        quieten()
        render = Backbone.load(arguments.model).prompt_text
    print(describe(data))
    seen: dict[tuple[str, str], int] = {}
    for decision in _spread(data):
        key = (decision.split, decision.kind)
        if seen.get(key, 0) < arguments.examples:
            seen[key] = seen.get(key, 0) + 1
            print()
            print(show(decision, render))
    return 0


def _run_name(config: str) -> str:
    """What a run is called after its config; a model's "2.5" is no suffix."""
    return Path(config).name.removesuffix(".yaml").removesuffix(".yml")


def quieten() -> None:
    """Keep transformers' loading bars and advice out of our output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _spread(data: DecisionSet) -> list[Decision]:
    """Decisions in an order in which the first few are not alike."""
    step = next(n for n in (7919, 104729, 1) if math.gcd(n, len(data)) == 1)
    return [data[(index * step) % len(data)] for index in range(len(data))]


def _backbone(name: str | None, steering: Steering | None) -> Backbone:
    stated = steering.config.base_model if steering else ""
    if not (name or stated):
        raise UserError("name the base model with --model; no steering states one")
    revision = steering.config.revision if steering and name in (None, stated) else None
    return Backbone.load(name or stated, revision=revision)


def _pairs(items: list[str], option: str) -> dict:
    if bad := [item for item in items if "=" not in item]:
        raise UserError(f"{option} {bad[0]!r}: expected key=value")
    return {key: parse_yaml(value) for key, value in (item.split("=", 1) for item in items)}


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--scales {text!r}: expected comma-separated numbers, as in 0,0.5,1")
    return numbers
