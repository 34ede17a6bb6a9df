"""What steering costs at inference: prefill and decode with hooks, with a scale a row, merged, and as a LoRA of PEFT's
with the 16 strongest slopes, against the base.

Every variant is a model of its own that shares the base's weights, so that nothing is attached or compiled between
measurements. A round measures all of them, one after the other; ratios are within a round, as machines are noisy.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from dso.exports.lora import lora_plan
from dso.exports.peft import write_lora
from dso.exports.plan import plan_merge
from dso.exports.running import merged_parameters
from dso.files import write_text
from dso.models.backbone import Backbone
from dso.steering.model import Steering

SCALE = 0.5
RANK = 16  # what multi-LoRA servers take without further ado
IMPORTS = {
    "torch and transformers": "import torch, transformers",
    "dso": "from dso import Backbone, Steering",
}


def overhead(arguments: argparse.Namespace) -> None:
    """Ratios of time to the base model's, with their quartiles, and of the time of an import."""
    backbone = Backbone.load(arguments.model, dtype=arguments.dtype, layout="padded")
    steering = _steering(backbone.model, arguments.operator)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    results: dict[str, Any] = {
        "model": arguments.model, "dtype": arguments.dtype, "operator": arguments.operator, "clock": arguments.clock,
        "device": str(backbone.device), "threads": torch.get_num_threads(), "batch": arguments.batch,
        "prompt": arguments.prompt, "new": arguments.new, "rounds": arguments.rounds,
    }  # fmt: skip
    models = _variants(backbone.model, steering, arguments.batch)
    modes = {"eager": models}
    if arguments.compiled:
        torch._dynamo.config.recompile_limit = 64  # a graph a variant and shape
        modes["compiled"] = {name: torch.compile(model) for name, model in models.items()}
    for mode, variants in modes.items():
        results[mode] = _compare(variants, arguments, clock)
    if arguments.imports:
        results["import"] = _imports(arguments.imports)
    for mode in modes:
        print(f"{mode:<10}" + "".join(f"{name:>24}" for name in models if name != "base"))
        for phase, row in results[mode].items():
            told = (f"{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for n, r in row.items() if n != "base")
            print(f"{phase:<10}" + "".join(f"{text:>24}" for text in told))
    if arguments.imports:
        print(f"import dso: {results['import']['ratio']:.3f} of importing torch and transformers")
    write_text(Path(arguments.results) / "overhead.json", json.dumps(results, indent=1) + "\n")


def _steering(model: Any, operator: str) -> Steering:
    """As it is loaded: small numbers, nothing of them trained."""
    made = Steering.for_model(model, operator=operator)
    for value in made.tensors().values():
        value.data = 0.01 * torch.randn(value.shape)
    return made.requires_grad_(False)


def _variants(model: Any, steering: Steering, batch: int) -> dict[str, Any]:
    from peft import PeftModel

    scales = torch.linspace(0.1, 1.0, batch)
    found = {name: _twin(model) for name in ("base", "hooks", "per row", "merged", "lora", "base again")}
    steering.attach(found["hooks"], SCALE)
    steering.attach(found["per row"], scales)
    with torch.no_grad():
        for name, value in merged_parameters(plan_merge(steering, model, SCALE), model).items():
            owner, _, key = name.rpartition(".")
            weight = nn.Parameter(value.to(model.dtype), requires_grad=False)
            found["merged"].get_submodule(owner).register_parameter(key, weight)
    with TemporaryDirectory() as made:
        folder = Path(made) / "lora"
        write_lora(lora_plan(steering, model, rank=RANK, allow_partial=True), model, folder, SCALE)
        found["lora"] = PeftModel.from_pretrained(found["lora"], folder).eval()
    return found


def _twin(model: Any) -> Any:
    """The same modules anew, on the same weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


@torch.inference_mode()
def _compare(models: dict[str, Any], arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    """Phase -> variant -> seconds, and ratio to the base with quartiles."""
    one = next(iter(models.values()))
    device = one.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    shape, words = (arguments.batch, arguments.prompt), one.config.get_text_config().vocab_size
    ids = torch.randint(5, words, shape, generator=generator).to(device)
    taken: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in models} for phase in ("prefill", "decode")}
    names = list(models)
    for number in range(arguments.rounds + 1):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):  # each is first in turn
            seconds = _once(models[name], ids, arguments.new, clock)
            if number:  # the first round compiles, and warms caches up
                for phase, value in zip(taken, seconds, strict=True):
                    taken[phase][name].append(value)
    return {phase: _ratios(row) for phase, row in taken.items()}


def _once(model: Any, ids: Tensor, new: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of a prompt's pass, and of ``new`` tokens after it, one by one."""
    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + new)
    start = _now(clock)
    token = model(ids, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    middle = _now(clock)
    for _ in range(new):
        token = model(token, past_key_values=cache).logits.argmax(-1)
    return middle - start, _now(clock) - middle


def _now(clock: Callable[[], float]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def _ratios(row: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    found = {}
    for name, seconds in row.items():
        low, middle, high = torch.tensor([a / b for a, b in zip(seconds, row["base"], strict=True)]).quantile(
            torch.tensor([0.25, 0.5, 0.75])
        )
        found[name] = {"seconds": median(seconds), "ratio": float(middle), "low": float(low), "high": float(high)}
    return found


def _imports(rounds: int) -> dict[str, float]:
    """CPU seconds of imports in fresh interpreters, and what ours costs of what is needed anyway."""
    taken: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for number in range(rounds + 1):
        for name, code in IMPORTS.items():
            process = subprocess.Popen([sys.executable, "-c", code])
            usage = os.wait4(process.pid, 0)[2]
            process.returncode = 0
            if number:
                taken[name].append(usage.ru_utime + usage.ru_stime)
    seconds = {name: median(values) for name, values in taken.items()}
    return seconds | {"ratio": median(b / a for a, b in zip(*taken.values(), strict=True))}
