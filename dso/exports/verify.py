"""Asking a folder, or a server, whether it is the model that a probe was made of."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dso.errors import UserError
from dso.exports.probe import TOP, Answer, Probe, Verdict, judge
from dso.exports.running import logits
from dso.exports.shards import Shards
from dso.models.loading import dtype_name, load_parts

PATIENCE = 120.0  # seconds for one answer; a server may still be loading


def verify_folder(folder: Path, probe: Probe) -> Verdict:
    """Ask the model in a folder, as transformers loads it in the dtype it is stored in.

    Raises:
        UserError: if it cannot be loaded.
    """
    stored = Shards(folder).dtype()
    model, _, _ = load_parts(str(folder), None, dtype_name(stored))
    rows = logits(model.eval(), torch.tensor([prompt.ids for prompt in probe.prompts]))[:, -1]
    return judge_logits(probe, rows)


def judge_logits(probe: Probe, rows: Tensor) -> Verdict:
    """Hold next-token logits (prompts, vocabulary) against a probe."""
    found = rows.log_softmax(-1)
    pairs = zip(probe.prompts, found, strict=True)
    return judge(probe, [Answer({token: row[token].item() for token in prompt.tokens}, {}) for prompt, row in pairs])


def verify_url(url: str, model: str | None, probe: Probe) -> tuple[Verdict, str]:
    """Ask a server with OpenAI's completions endpoint; with a note on how it went, which may be empty.

    Prompts are sent as token ids; a server that takes text only gets their text. ``$OPENAI_API_KEY`` is sent if set.

    Args:
        url: with or without ``/v1`` or ``/v1/completions``.
        model: the name by which the server knows the model; None takes the first that it lists.
        probe: of the folder that it should be serving.

    Raises:
        UserError: if it cannot be reached, refuses, or gives no log-probabilities.
    """
    root = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
    place = f"{root}/completions"
    name = _first_model(f"{root}/models") if model is None else model
    note, answers = "", []
    for prompt in probe.prompts:
        body = {"model": name, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
        try:
            reply = _ask(place, body | {"prompt": list(prompt.ids)})
        except _Refused:
            try:
                reply = _ask(place, body | {"prompt": prompt.text})
            except _Refused as error:
                raise UserError(str(error)) from error
            note = "it takes no token ids; the prompts were sent as text, to which it may have added a token of its own"
        answers.append(_answer(reply, place))
    return judge(probe, answers), note


class _Refused(Exception):
    """The server understood the request and did not want it."""


def _first_model(place: str) -> str:
    try:
        return str(_ask(place)["data"][0]["id"])
    except (_Refused, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{place}: lists no model; name it with --model") from error


def _ask(place: str, body: Mapping[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(place, data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            return json.loads(reply.read())
    except urllib.error.HTTPError as error:
        text = " ".join(error.read(500).decode("utf-8", "replace").split())
        if error.code in (400, 422):
            raise _Refused(f"{place}: {error.code}: {text}") from error
        raise UserError(f"{place}: {error.code}: {text}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"{place}: no answer: {getattr(error, 'reason', error)}") from error


def _answer(reply: Any, place: str) -> Answer:
    """The listed tokens, in the shape of OpenAI's completions, or in that of its chats (llama.cpp's server)."""
    by_id: dict[int, float] = {}
    by_word: dict[str, float] = {}
    try:
        found = reply["choices"][0]["logprobs"]
        if "content" in found:
            for entry in found["content"][0]["top_logprobs"]:
                by_word[str(entry["token"])] = float(entry["logprob"])
                if "id" in entry:
                    by_id[int(entry["id"])] = float(entry["logprob"])
        else:
            by_word = {str(word): float(value) for word, value in found["top_logprobs"][0].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place}: its answer has no log-probabilities of the most probable tokens; start the server so that it "
            "gives them"
        ) from error
    return Answer(by_id, by_word)
