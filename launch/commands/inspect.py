"""``dso inspect``: show what a steering states and which sites it moves most."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dso.evaluation.comparison import cut_text
from dso.evaluation.report import ScalePoint, decimal_text, interval_text
from dso.steering.config import TRAINED_AT
from dso.steering.model import Steering


def run(arguments: argparse.Namespace) -> int:
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
    print(f"fingerprint  {config.base_id}")
    print(f"fair shares  {shares}")
    print(f"scoring      {'mean a token' if config.scoring.length_normalised else 'sum of tokens'}")
    own = "" if config.default_scale == TRAINED_AT else f", {config.default_scale:g} unless one is named"
    print(f"scale        {config.scale_range[0]:g} to {config.scale_range[1]:g}{own}")
    print(f"coefficients {total}, of which {zero} are exactly 0")
    for line in _measured(config.scale_curve):
        print(line)
    norms = {
        site: {key: float(value.norm()) for key, value in operator.named_parameters()}
        for site, operator in steering.operators.items()
    }
    print("sites moved most:")
    for site in sorted(norms, key=lambda site: sum(norms[site].values()), reverse=True)[: arguments.top]:
        print(f"  {site:<44} {'  '.join(f'|{key}| {norm:.3f}' for key, norm in norms[site].items())}")
    return 0


def _measured(curve: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a scale at which the steering was measured."""
    try:
        points = [ScalePoint.from_json(record) for record in curve]
    except ValueError:
        yield "measured     by an older version of dso; dso evaluate measures anew"
        return
    for point in points:
        cut = f", cut by {cut_text(point.cut.bias)}" if point.cut else ""
        bias = f"bias {interval_text(point.bias.bias)}{cut}; log-odds {interval_text(point.bias.log_odds.bias)}"
        yield f"at scale {point.scale:<4g}{bias}; order effect {decimal_text(point.bias.order_effect, 2)}"
