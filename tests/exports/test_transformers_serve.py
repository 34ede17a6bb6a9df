"""``transformers serve`` runs what ``dso merge`` writes: its answers are those of the folder, and of the hooks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from exporting import moved
from openai import OpenAI
from serving import stop
from tiny import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM
from transformers.utils.import_utils import is_serve_available

from launch.cli import main

pytestmark = pytest.mark.skipif(
    not is_serve_available(), reason="transformers serve needs its extra: pip install 'transformers[serving]'"
)
SCALE = 0.25
PROMPTS = ("The nurse is", "The pilot is", "Ann and Bob: the judge is")
PATIENCE = 120.0  # seconds until it takes requests; it takes 4 of one core


@contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """The address of ``transformers serve FOLDER``, started beside the folder on a port that is free."""
    command = [Path(sys.executable).with_name("transformers"), "serve", folder.name]
    log = folder.parent / "serve.log"
    with log.open("wb") as written:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"],
            cwd=folder.parent, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=written, stderr=written,
        )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE
        while not (found := re.search(r"running on (http://\S+)", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield found[1]
    finally:
        stop(server, 20)


def greedy(model, prompt: str) -> str:
    tokenizer = byte_tokenizer()
    given = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(made[0, given.input_ids.shape[1] :], skip_special_tokens=True)


def test_a_merged_folder_runs_under_transformers_serve(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama()
    steering = moved(model, "scale")
    steering.save_pretrained(tmp_path / "steering")
    words = ["merge", tmp_path / "steering", "--model", model_folder, "--scale", SCALE, "--out", tmp_path / "merged"]
    assert main([str(word) for word in words]) == 0
    with transformers_serve(tmp_path / "merged") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        served = [
            client.completions.create(model="merged", prompt=prompt, max_tokens=16, temperature=0).choices[0].text
            for prompt in PROMPTS
        ]
        asked = main(["verify", str(tmp_path / "merged"), "--url", url, "--model", "merged"])
    folder = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert served == [greedy(folder, prompt) for prompt in PROMPTS]
    with steering.on(model, SCALE):
        assert served == [greedy(model, prompt) for prompt in PROMPTS]
    assert all(text != greedy(model, prompt) for text, prompt in zip(served, PROMPTS, strict=True))  # the base model
    # It gives no log-probabilities, so the folder is what can be verified.
    assert asked == 2 and "its answer has no log-probabilities" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "merged")]) == 0
