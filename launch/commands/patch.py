"""``dso patch``: localise where two models differ, edit the one there, and write the edit as a sparse patch."""

from __future__ import annotations

import argparse

from dso.editing.localise import editable
from dso.editing.make import make_patch, where
from dso.errors import UserError
from dso.files import as_path
from dso.models.loading import load_parts
from launch.commands.common import quieten


def run(arguments: argparse.Namespace) -> int:
    """``dso patch``."""
    out = as_path(arguments.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is no folder; name a new one with --out")
    quieten()
    target, reference = (load_parts(name, None, "float32")[0] for name in (arguments.target, arguments.reference))
    patch = make_patch(
        target,
        reference,
        method=arguments.method,
        edit=arguments.edit,
        k=arguments.k,
        sparsity=arguments.sparsity,
        base_model=arguments.target,
        reference_model=arguments.reference,
    )
    total = sum(weight.numel() for weight in editable(target).values())
    layers, kinds = where(patch.places)
    low, high = patch.config.scale_range
    lines = [
        f"{len(patch):,} of {total:,} weights ({len(patch) / total:.2%}) of {arguments.target} for {arguments.edit}, "
        f"method {arguments.method}, reference {arguments.reference}; scale {low:g} to {high:g}",
        "by kind: " + ", ".join(f"{kind} {number / len(patch):.0%}" for kind, number in kinds.most_common()),
        "by layer: " + ", ".join(f"{layer} {number / len(patch):.0%}" for layer, number in sorted(layers.items())),
    ]
    patch.save_pretrained(out, "# Patch\n\n" + "\n\n".join(lines) + "\n")
    print("\n".join([*lines, f"written to {arguments.out}"]))
    return 0
