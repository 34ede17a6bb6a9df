"""``dso inspect``: show what a steering states and which sites it moves most."""

from __future__ import annotations

import argparse

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
