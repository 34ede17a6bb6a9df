"""``dso export``: write a steering as an adapter that other programs load."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from dso.errors import UserError
from dso.exports.gguf_lora import write_gguf_lora
from dso.exports.lora import lora_plan
from dso.exports.peft import check_scale, require_new, write_ln_tuning, write_lora
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from launch.commands.common import load_backbone, numbers, open_split, quieten
from launch.commands.cost import cost_table

SHOWN = 5  # sites that are left out, by name


def run(arguments: argparse.Namespace) -> int:
    """``dso export``."""
    quieten()
    if arguments.rank and arguments.to == "ln-tuning":
        raise UserError("--rank is of LoRA; LN tuning holds all slopes of a norm at no cost")
    if arguments.tied_head and arguments.to != "lora":
        raise UserError("--tied-head is of --to lora; LN tuning needs no head, and llama.cpp has none of its own then")
    given = None if arguments.scale is None else numbers(arguments.scale, "--scale")
    steering = Steering.from_pretrained(arguments.steering)
    scales = given or [steering.config.default_scale]
    folders = _folders(Path(arguments.out), scales)
    for folder, scale in folders.items():  # before the first is written, and before the model is loaded
        check_scale(steering, scale)
        require_new(folder)
    backbone = load_backbone(arguments, steering)
    part, left_out = _write(arguments, steering, backbone, folders)
    for site, reason in list(left_out.items())[:SHOWN]:
        print(f"left out: {site}: {reason}")
    if len(left_out) > SHOWN:
        print(f"left out: {len(left_out) - SHOWN} more")
    for folder in folders:
        print(f"wrote {folder}")
    if arguments.decisions:
        data = open_split(arguments.decisions, arguments)
        print(cost_table(backbone, data, steering, part, scales, "the adapter"))
    return 0


def _folders(out: Path, scales: list[float]) -> dict[Path, float]:
    """The folder itself for one scale, or one in it for each of several."""
    if len(scales) == 1:
        return {out: scales[0]}
    return {out / f"scale-{scale:g}": scale for scale in scales}


def _write(
    arguments: argparse.Namespace, steering: Steering, backbone: Backbone, folders: Mapping[Path, float]
) -> tuple[Steering, dict[str, str]]:
    """Write the folders; what they do as a steering, and what is left out of it."""
    model, partial = backbone.model, arguments.allow_partial
    if arguments.to == "ln-tuning":
        for folder, scale in folders.items():
            part, left_out = write_ln_tuning(steering, model, folder, scale, allow_partial=partial)
        return part, left_out
    gguf = arguments.to == "gguf-lora"
    tied = arguments.tied_head
    plan = lora_plan(steering, model, rank=arguments.rank, offsets=not gguf, tied_head=tied, allow_partial=partial)
    for folder, scale in folders.items():
        (write_gguf_lora if gguf else write_lora)(plan, model, folder, scale)
    cut = f"; {plan.cut} weaker slopes are left out" if plan.cut else ""
    print(f"LoRA of rank {plan.rank} on {len(plan.layers)} linear layers{cut}")
    if plan.offsets:
        print("it has offsets (lora_bias), which PEFT adds and vLLM refuses; --to gguf-lora leaves them out")
    return plan.steering, plan.left_out
