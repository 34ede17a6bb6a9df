"""A probe says yes to the merged model and no to others: as a folder, and behind a server of OpenAI's shape."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from small_runs import write_config
from tiny import byte_tokenizer, small_set, tiny_llama
from transformers import AutoModelForCausalLM

from dso.errors import UserError
from dso.exports.merge import Merging
from dso.exports.probe import BASE, Answer, Probe, Prompt, judge, make_probe, read_probe
from dso.exports.running import logits
from dso.exports.verify import verify_folder, verify_url
from dso.steering.model import Steering
from launch.cli import main
from launch.commands.merge import _decisions
from launch.commands.parsers import build_parser


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a steering of each kind for it, and the merged folder."""
    folder = tmp_path_factory.mktemp("merged")
    model = tiny_llama()
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    for kind in ("scale", "affine"):
        steering = Steering.for_model(model, operator=kind, base_model=str(folder / "base"), groups=("female", "male"))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for value in steering.tensors().values():
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        steering.save_pretrained(folder / kind)
    small_set().write_jsonl(folder / "set.jsonl")
    Merging.of(Steering.from_pretrained(folder / "scale"), 0.5).write(folder / "out")
    return folder


def test_answers_are_held_against_the_probes_own_tokens() -> None:
    prompt = Prompt("x", (1,), (7, 8, 9), ("a", "b", "c"), (-0.5, -1.0, -3.0), {"base": (-0.7, -1.0, -2.6)})
    probe = Probe((prompt,), 0.1, {})

    def found(**answers: float) -> tuple[float, float, bool]:
        verdict = judge(probe, [Answer({}, answers)])
        return verdict.largest, verdict.shares["base"], verdict.passed

    assert found(a=-0.5, b=-1.0, c=-3.0) == (0.0, 1.0, True)
    assert found(a=-0.7, b=-1.0, c=-2.6) == (pytest.approx(0.4), 0.0, False)
    # 0.2 and -0.4 are the merged model's distances from the base: half of the second is (0.2^2 + 0.2 * 0.4) / 0.2.
    assert found(a=-0.5, b=-1.0, c=-2.8) == (pytest.approx(0.2), pytest.approx(0.6), False)
    assert found(a=-0.55, b=-1.0, c=-2.95) == (
        pytest.approx(0.05),
        pytest.approx((0.15 * 0.2 + 0.35 * 0.4) / 0.2),
        True,
    )
    # "b" is not among those listed, so it has at most their least, -2: one below what is wanted.
    assert found(a=-0.5, c=-3.0, d=-2.0)[0] == 0 + (-1.0 + 3.0)
    assert found(a=-0.5, b=-1.0, d=-3.5)[0] == 0.5
    assert judge(probe, [Answer({7: -0.5, 8: -1.25, 9: -3.0}, {"b": -9.0})]).largest == 0.25  # ids go before texts
    for answer, message in ((Answer({}, {}), "lists no log-prob"), (Answer({}, {"z": -1.0}), "by its text")):
        with pytest.raises(UserError, match=message):
            judge(probe, [answer])


def test_an_answer_within_the_tolerance_that_lies_at_the_base_does_not_pass() -> None:
    prompt = Prompt("x", (1,), (7, 8), ("a", "b"), (-0.5, -1.0), {"base": (-0.45, -1.05), "same": (-0.5, -1.0)})
    verdict = judge(Probe((prompt,), 0.1, {}), [Answer({7: -0.46, 8: -1.04}, {})])
    assert verdict.largest == pytest.approx(0.04) and verdict.shares["base"] == pytest.approx(0.2)
    assert math.isnan(verdict.shares["same"]) and not verdict.passed


def test_a_probe_keeps_the_prompts_that_tell_most_and_allows_twice_the_rounding() -> None:
    ids = torch.arange(16).reshape(8, 2) + 40
    wanted = torch.zeros(8, 258)
    wanted[:, 50] = 3.0
    rounded, base = wanted.clone(), wanted.clone()
    rounded[7, 50] += 0.5
    base[:, 50] += torch.arange(8) / 10
    probe = make_probe(byte_tokenizer(), ids, wanted, rounded, {BASE: base}, {})
    assert [prompt.ids[0] for prompt in probe.prompts] == [
        52,
        50,
        48,
        46,
        44,
        42,
    ]  # not the last, where rounding is most
    first = wanted[6].log_softmax(-1)
    assert probe.prompts[0].tokens[0] == 50 and probe.prompts[0].log_probs[0] == pytest.approx(
        first[50].item(), abs=1e-5
    )
    assert probe.apart(BASE) == pytest.approx((base[6].log_softmax(-1) - first).abs().max().item(), abs=2e-5)
    assert probe.tolerance == 0.01  # without rounding, the least


def test_tokens_without_a_text_of_their_own_are_left_out() -> None:
    tokenizer = byte_tokenizer()
    parts = [token for token in range(258) if "\ufffd" in tokenizer.decode([token])][:2]  # of characters
    logits = torch.zeros(8, 258)
    logits[:, [*parts, 60, 61]] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    probe = make_probe(tokenizer, torch.full((8, 2), 40), logits, logits, {BASE: logits}, {})
    assert probe.prompts[0].tokens[:2] == (60, 61) and "\ufffd" not in "".join(probe.prompts[0].words)


def test_the_folder_passes_and_its_base_fails(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probe = read_probe(place / "out")
    assert verify_folder(place / "out", probe).largest < 1e-4
    found = verify_folder(place / "base", probe)
    assert found.largest == pytest.approx(probe.apart(BASE), abs=1e-4)
    assert found.shares[BASE] == pytest.approx(0, abs=1e-4) and not found.passed
    assert main(["verify", str(place / "out")]) == 0
    assert "yes, it is the merged model\nlargest difference" in capsys.readouterr().out


def test_a_program_that_skips_new_biases_is_found_out(place: Path, tmp_path: Path) -> None:
    Merging.of(Steering.from_pretrained(place / "affine"), 0.5).write(tmp_path / "out", allow_partial=True)
    probe = read_probe(tmp_path / "out")
    assert verify_folder(tmp_path / "out", probe).passed
    shutil.copytree(tmp_path / "out", tmp_path / "skipping")
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    for skipped in (["mlp_bias"], ["attention_bias"], ["attention_bias", "mlp_bias"]):
        changed = record | dict.fromkeys(skipped, False)
        (tmp_path / "skipping" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
        verdict = verify_folder(tmp_path / "skipping", probe)
        assert verdict.shares[f"merged model without {' and '.join(skipped)}"] == pytest.approx(0, abs=1e-4)
        assert not verdict.passed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ('{"format": 2}', "format 2, this dso reads 1"),
        ('{"format": 1, "tolerance": 1}', "damaged: no 'prompts'"),
        ('{"format": 1, "tolerance": 1, "made": {}, "prompts": []}', "damaged: a prompt is empty"),
    ],
)
def test_a_probe_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match="no dso_probe.json; dso merge writes one"):
        read_probe(tmp_path)
    (tmp_path / "dso_probe.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_probe(tmp_path)


@contextmanager
def serving(folder: Path, shape: str = "openai", ids: bool = True) -> Iterator[tuple[str, list[dict]]]:
    """A server that answers as vLLM does (``openai``), or as llama.cpp's (``content``), with the model of a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer, asked = byte_tokenizer(), []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, code: int, record: dict) -> None:
            body = json.dumps(record).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "served"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
            prompt = body["prompt"]
            if isinstance(prompt, list) and not ids:
                return self.reply(422, {"error": "prompt: expected a string"})
            if shape == "broken":
                return self.reply(500, {"error": "out of memory"})
            if isinstance(prompt, str):
                prompt = tokenizer(prompt).input_ids
            best = logits(model, torch.tensor([prompt]))[0, -1].log_softmax(-1).topk(body["logprobs"])
            pairs = [
                (i, tokenizer.decode([i]), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            found: dict | None = {"top_logprobs": [{word: p for _, word, p in pairs}]}
            if shape == "content":
                top = [{"id": i, "token": f"<{i}>", "logprob": p} for i, _, p in pairs]
                found = {"content": [{"top_logprobs": top}]}
            if shape == "none":
                found = None
            return self.reply(200, {"choices": [{"text": "", "logprobs": found}]})

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("shape", ["content", "openai"])
def test_a_server_with_the_merged_weights_passes_and_one_without_fails(
    place: Path, shape: str, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    probe = read_probe(place / "out")
    with serving(place / "out", shape) as (url, asked):
        for form in (url, f"{url}/v1/", f"{url}/v1/completions"):
            assert verify_url(form, "mine", probe)[0].passed
        assert {call["path"] for call in asked} == {"/v1/completions"} and asked[0]["model"] == "mine"
        assert asked[0]["prompt"] == list(probe.prompts[0].ids) and asked[0]["key"] == "Bearer secret"
        assert main(["verify", str(place / "out"), "--url", url]) == 0
        assert asked[-1]["model"] == "served"
    with serving(place / "base", shape) as (url, _):
        assert main(["verify", str(place / "out"), "--url", url, "--model", "mine"]) == 1
    out = capsys.readouterr().out
    assert "no, it is another model, or skips a part of this one" in out
    assert "\n0% of the way from the base model to the merged model" in out


def test_a_server_that_takes_text_only_gets_text_and_this_is_said(place: Path) -> None:
    with serving(place / "out", "content", ids=False) as (url, asked):
        verdict, note = verify_url(url, None, read_probe(place / "out"))
    assert verdict.largest < 1e-4 and "sent as text" in note
    assert [type(call["prompt"]) for call in asked[:2]] == [list, str]


@pytest.mark.parametrize(("shape", "message"), [("none", "no log-probabilities"), ("broken", "500: .*out of memory")])
def test_an_answer_that_says_nothing_is_one_line(place: Path, shape: str, message: str, capsys) -> None:
    with serving(place / "out", shape) as (url, _):
        assert main(["verify", str(place / "out"), "--url", url]) == 2
    assert main(["verify", str(place / "out"), "--url", url]) == 2  # nobody is there any more
    first, second = capsys.readouterr().err.splitlines()
    assert re.search(message, first) and "no answer" in second


def test_the_command_merges_and_says_what_it_did(place: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["merge", str(place / "scale"), "--scale", "0.5", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "merged       5 of 5 sites in full, scale 0.5, in float32" in text
    assert "rounding     0.0% of 80 changed values vanish in float32" in text
    assert f"dso verify {out} --url URL --model NAME" in text
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    wanted = AutoModelForCausalLM.from_pretrained(place / "out").state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in again.items())


def test_the_command_says_what_leaving_out_costs_and_stops_unless_told(place: Path, tmp_path: Path, capsys) -> None:
    command = ["merge", str(place / "affine"), "--out", str(tmp_path / "out")]
    assert main(command) == 2
    found = capsys.readouterr()
    assert "What has no place in LlamaForCausalLM (1 of 5 sites):\n  offset at model.norm: lm_head has" in found.out
    assert "--decisions SET measures it" in found.out
    assert "--allow-partial" in found.err and not (tmp_path / "out").exists()
    assert main([*command, "--allow-partial", "--decisions", str(place / "set.jsonl")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("On 40 decisions"))) + 1 :][:5]
    kl = {
        line.split("  ")[0].strip(): float(line.split()[-2]) for line in table if line[:4] in ("base", "with", "merg")
    }
    assert kl["base"] == 0 < abs(kl["with hooks"] - kl["merged"])
    words = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split()  # its lines are filled
    assert " ".join(words).count("without the offset at model.norm") == 1


def test_what_leaving_out_costs_is_measured_on_the_runs_own_test_split(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, place / "base", data__set=str(place / "set.jsonl")).rename(tmp_path / "config.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    for steering in (str(tmp_path / "steering"), "~/steering"):
        found = _decisions(build_parser().parse_args(["merge", steering, "--out", str(tmp_path / "out")]))
        assert found is not None and {decision.split for decision in found} == {"test"} and len(found) == 40
    assert _decisions(build_parser().parse_args(["merge", str(place / "scale"), "--out", "x"])) is None
