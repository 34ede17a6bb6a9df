"""Folders that PEFT loads as adapters, without ``dso`` and without anything that it would have to install.

    PeftModel.from_pretrained(model, folder)

The files are written as PEFT writes them (``adapter_config.json``, ``adapter_model.safetensors``); PEFT itself is not
needed to write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from dso.errors import UserError
from dso.exports.lora import LoraPlan, restricted, target_modules
from dso.exports.maps import affine_map
from dso.exports.norms import norm_form
from dso.exports.plan import Change
from dso.files import as_path, replace_folder, write_bytes, write_text
from dso.models.embedded import HUB_IDS
from dso.steering.fingerprint import require_same
from dso.steering.hosts import named_sites
from dso.steering.model import Steering
from dso.steering.sites import linear_width

PREFIX = "base_model.model."  # before the names of the model's own modules, in every adapter of PEFT


def write_lora(plan: LoraPlan, model: nn.Module, folder: str | Path, scale: float) -> None:
    """Write a LoRA adapter of a steering at one scale; alpha / r is the scale.

    Another scale is the same folder with another ``lora_alpha`` in its config.

    Raises:
        UserError: if the scale is 0 or outside the steering's range, or the folder holds something already.
    """
    config = _config(plan.steering, "LORA") | {
        "r": plan.rank,
        "lora_alpha": _whole(check_scale(plan.steering, scale) * plan.rank),
        "target_modules": target_modules(plan.layers, model),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": plan.offsets,
        "fan_in_fan_out": plan.transposed,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for name, layer in plan.layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.b
        if layer.bias is not None:
            tensors[f"{PREFIX}{name}.lora_B.bias"] = layer.bias
    _write(folder, config, tensors, lora_card(plan, scale))


@torch.no_grad()
def write_ln_tuning(
    steering: Steering,
    model: nn.Module,
    folder: str | Path,
    scale: float,
    *,
    allow_partial: bool = False,
    check: bool = True,
) -> tuple[Steering, dict[str, str]]:
    """Write an LN-tuning adapter (Zhao et al., arXiv 2312.11420): the weights, and biases, of the steered norms.

    Slopes are exact for every norm with a weight; offsets go into the norm's own bias, and have no place without one.

    Returns:
        What the adapter does, as a steering, and site -> why it, or its offset, is left out.

    Raises:
        UserError: naming what has no place, unless ``allow_partial``; else as :func:`write_lora`.
    """
    check_scale(steering, scale)
    config, modules = steering.config, named_sites(model)
    if check:
        require_same(config.fingerprint, model, config.sites, f"the steering is for {config.base_model!r}")
    tensors: dict[str, Tensor] = {}
    kept, left_out = restricted(steering, list(config.sites)), {}
    for site, operator in kept.operators.items():
        module: Any = modules[site]
        coefficients = dict(operator.named_parameters())
        form = None if linear_width(module) or "u" in coefficients else norm_form(module, operator.width)
        if form is None or not form.weight:
            left_out[site] = "it is no norm with a weight, or its operator is no slope"
            _clear(coefficients.values())
            continue
        if "b" in coefficients and coefficients["b"].any() and not form.bias:
            left_out[site] = "the norm has no bias for its offset"
            _clear([coefficients["b"]])
        old = module.weight.detach().cpu(), module.bias.detach().cpu() if form.bias else None
        weight, bias = Change(form=form, own=affine_map(operator, scale)).apply(*old)
        new = {"weight": weight, "bias": bias}
        tensors |= {f"{PREFIX}{site}.ln_tuning_layers.{key}": value for key, value in new.items() if value is not None}
    if left_out and not allow_partial:
        site, reason = next(iter(left_out.items()))
        raise UserError(
            f"{len(left_out)} of {len(config.sites)} sites do not fit into LN tuning: {site!r} ({reason}) is the "
            "first; --allow-partial leaves out what does not"
        )
    if not tensors:
        raise UserError("no site fits into LN tuning")
    sites = list(dict.fromkeys(key.removeprefix(PREFIX).partition(".ln_tuning_layers.")[0] for key in tensors))
    stated = _config(steering, "LN_TUNING") | {"target_modules": sites}
    _write(folder, stated, tensors, card(steering, scale, left_out, "LN tuning"))
    return kept, left_out


def _clear(values: Any) -> None:
    for value in values:
        value.zero_()


def check_scale(steering: Steering, scale: float) -> float:
    """The scale, if it can be exported.

    Raises:
        UserError: if it is 0, which needs no adapter, or outside the range that the steering states.
    """
    low, high = steering.config.scale_range
    if scale == 0:
        raise UserError("scale 0 is the base model, which needs no adapter")
    if not low <= scale <= high:
        raise UserError(f"scale is {scale:g}, expected a number from {low:g} to {high:g}, the range of this steering")
    return scale


def lora_card(plan: LoraPlan, scale: float) -> str:
    """The README of a LoRA."""
    text = card(plan.steering, scale, plan.left_out, f"LoRA of rank {plan.rank}")
    if plan.tied:
        text += "\nIts output layer has the weight of the embedding: do not merge it into the weights.\n"
    if plan.cut:
        text += f"\nOnly the {plan.rank} strongest slopes of each site are in it; {plan.cut} others are left out.\n"
    if plan.offsets:
        text += "\nIt has biases (`lora_bias`), which PEFT adds; vLLM and llama.cpp take no such adapter.\n"
    return text


def card(steering: Steering, scale: float, left_out: Mapping[str, str], kind: str) -> str:
    """The README of an adapter."""
    config = steering.config
    groups = ", ".join(f"{group} {share:.3g}" for group, share in zip(config.groups, config.target, strict=True))
    lines = [
        f"# Steering at scale {scale:g}, as {kind}",
        "",
        f"Base model: {config.base_model or 'not stated'}. Its decisions are made equiprobable"
        + (f" across groups (fair shares: {groups})." if groups else "."),
        "",
        "Written by `dso export`; loading it does not need `dso`.",
    ]
    if left_out:
        lines += ["", f"Left out of the steering ({len(left_out)} sites):", ""]
        lines += [f"- `{site}`: {reason}" for site, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def _config(steering: Steering, kind: str) -> dict[str, Any]:
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": HUB_IDS.get(steering.config.base_model, steering.config.base_model) or None,
        "revision": steering.config.revision,
        "inference_mode": True,
        "modules_to_save": None,
    }


def _whole(value: float) -> float | int:
    """Whole numbers as such: PEFT's own type of alpha, which engines may insist on."""
    return int(value) if float(value).is_integer() else float(value)


def _write(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], text: str) -> None:
    with replace_folder(require_new(folder)) as fresh:
        own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
        data = save_safetensors(own, {"format": "pt"})  # which refuses tensors that share memory
        write_bytes(fresh / "adapter_model.safetensors", data)
        write_text(fresh / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_text(fresh / "README.md", text)


def require_new(folder: str | Path) -> Path:
    """A folder that is not there, or empty.

    Raises:
        UserError: if it holds something.
    """
    place = as_path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder, or remove it first")
    return place
