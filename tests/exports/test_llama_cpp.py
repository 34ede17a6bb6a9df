"""llama.cpp's own server runs what ``dso export`` and ``dso merge`` write, and says what the hooks say."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny
from exporting import moved
from llama_cpp import next_token, write_gguf
from tiny import byte_tokenizer
from transformers import AutoModelForCausalLM

from dso.exports.lora import lora_plan
from dso.steering.model import Steering
from launch.cli import main

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp's server is not here: pip install xllamacpp")
DOCS = Path(__file__).parents[2] / "docs" / "adapters.md"
# Keys and values are 16 bits wide otherwise, and work is for one core.
EXACT = """
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.port, params.verbosity = 0, -1
"""
SCALES = (None, 0.0, 0.25, 0.5, 1.0)
IDS = [*range(40, 52)]


def documented_server(model: Path, adapter: Path | None) -> Any:
    """The server of docs/adapters.md, on other files."""
    text = DOCS.read_text("utf-8")
    source = next(part for part in text.split("```python\n") if part.startswith("import xllamacpp")).partition("```")[0]
    lines = [line for line in source.splitlines() if adapter or ".lora_adapters" not in line]
    source = "\n".join(lines).replace("MODEL.gguf", str(model)).replace("gguf/adapter.gguf", str(adapter))
    head, start, tail = source.partition("server = ")
    assert start and tail
    names: dict[str, Any] = {}
    exec(head + EXACT + start + tail, names)
    return names["server"]


@torch.no_grad()
def hooked(model: torch.nn.Module, steering: Any, scale: float | None) -> torch.Tensor:
    with steering.on(model, scale or 0.0):
        return model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)


def command(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Gemma3"])
def test_requests_of_mixed_strengths_get_what_the_hooks_give(name: str, tmp_path: Path) -> None:
    """Eight at a time, in mixed order: nothing that was computed at one strength is used for another.

    llama.cpp looks Gemma's GELU up in a table of 16-bit values.
    """
    model = tiny(name)
    write_gguf(model, tmp_path / "model.gguf")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    moved(model, "scale").save_pretrained(tmp_path / "steering")
    words = ("export", tmp_path / "steering", "--model", tmp_path / "model", "--to", "gguf-lora", "--allow-partial")
    assert command(*words, "--out", tmp_path / "gguf") == 0
    steering = lora_plan(Steering.from_pretrained(tmp_path / "steering"), model, allow_partial=True).steering
    wanted = {scale: hooked(model, steering, scale) for scale in SCALES}
    effect = min((wanted[scale] - wanted[0.0]).abs().max() for scale in (0.25, 0.5, 1.0))
    assert effect > 0.1
    asked = [*SCALES] * 4
    random.Random(1).shuffle(asked)
    server = documented_server(tmp_path / "model.gguf", tmp_path / "gguf" / "adapter.gguf")
    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(lambda scale: next_token(server.listening_address, IDS, scale), asked)]
    for scale, row in zip(asked, found, strict=True):
        torch.testing.assert_close(row, wanted[scale], atol=2e-3 if name == "Gemma3" else 1e-4, rtol=0)


def test_a_merged_folder_passes_its_probe_there_biases_included(tmp_path: Path) -> None:
    model = tiny("Llama")
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    moved(model, "affine").save_pretrained(tmp_path / "steering")
    words = ("merge", tmp_path / "steering", "--model", tmp_path / "model", "--scale", 0.5, "--allow-partial")
    assert command(*words, "--out", tmp_path / "merged") == 0
    for folder, answer in (("merged", 0), ("model", 1)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        write_gguf(loaded, tmp_path / f"{folder}.gguf")
        server = documented_server(tmp_path / f"{folder}.gguf", None)
        assert command("verify", tmp_path / "merged", "--url", server.listening_address) == answer
