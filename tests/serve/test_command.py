"""``dso serve`` as a process: what it says, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from serving import strong_steering
from tiny import tiny_llama

from launch.cli import main


@pytest.fixture(scope="module")
def steering_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steering")
    strong_steering(tiny_llama()).save_pretrained(folder)
    return folder


def test_it_serves_until_sigterm_and_finishes_what_it_began(model_folder: Path, steering_folder: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "serve", str(steering_folder), "--model", str(model_folder)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--scale", "0.5"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"DSO_API_KEY": "secret"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {model_folder.name} at scales 0 to 2: http://127.0.0.1:"), line
        client = openai.OpenAI(base_url=line.split()[-1] + "/v1", api_key="secret", max_retries=2)
        options = {"model": model_folder.name, "prompt": "The nurse", "max_tokens": 300, "temperature": 0}
        whole = client.completions.create(**options).choices[0].text
        chunks = iter(client.completions.create(**options, stream=True))
        text = next(chunks).choices[0].text
        process.send_signal(signal.SIGTERM)
        assert text + "".join(chunk.choices[0].text for chunk in chunks) == whole
        assert process.wait(120) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
    finally:
        process.kill()


def test_an_address_that_is_taken_or_unknown_is_said_before_a_model_is_loaded(
    steering_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dso.serve.app import bind

    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(steering_folder), "--port", port, "--model", "nowhere"]) == 2
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use; try another" in capsys.readouterr().err
    assert main(["serve", str(steering_folder), "--host", "no.such.host.invalid"]) == 2
    assert "cannot listen at no.such.host.invalid:8000" in capsys.readouterr().err


def test_what_is_not_installed_is_named(
    steering_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(steering_folder)]) == 2
    assert "serving needs: pip install 'dso[serve]'" in capsys.readouterr().err
