"""What is asked of ``/v1/completions`` and ``/v1/chat/completions``: a body as jobs of the engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dso.decisions.decision import Message
from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.models.prompts import Prompt
from dso.serve.choosing import Sampling
from dso.serve.engine import Job
from dso.serve.fields import ApiError, Fields

MOST_CHOICES = 128
MOST_LOG_PROBS = 20
MOST_STOPS = 4
DEFAULT_TOKENS = 16  # OpenAI's, of completions
# What changes nothing where it says the first of these, and is not implemented.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,), "suffix": ("",), "logit_bias": ({},), "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0), "store": (False,), "service_tier": ("auto", "default"),
}  # fmt: skip
NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "logit_bias": ({},), "store": (False,),
    "presence_penalty": (0, 0.0), "frequency_penalty": (0, 0.0), "service_tier": ("auto", "default"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for.

    Attributes:
        scale: where a request names none.
        scales: the range that the steering states.
        max_tokens: of one answer.
        model: what the server calls the steered model.
    """

    scale: float
    scales: tuple[float, float]
    max_tokens: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request.

    Attributes:
        jobs: ``n`` for each prompt, prompt by prompt.
        echo: the text of each job's prompt, which the answer begins with; none unless it was asked for.
        stream: send the answer piece by piece.
        usage: end a stream with the counts of tokens.
        token_ids: write tokens as "token_id:7" where log-probabilities name them, as vLLM does.
        chat: whether it is a chat.
    """

    jobs: tuple[Job, ...]
    echo: tuple[str, ...]
    stream: bool
    usage: bool
    token_ids: bool
    chat: bool


def read_completion(body: dict[str, Any], backbone: Backbone, limits: Limits) -> Asked:
    """A body of ``/v1/completions``."""
    fields = Fields(body)
    prompts = [_encode(backbone, prompt, "prompt") for prompt in _prompts(fields)]
    echo = fields.flag("echo")
    count = fields.whole("logprobs", 0, MOST_LOG_PROBS, None)
    tokens = fields.whole("max_tokens", 0 if echo else 1, limits.max_tokens, min(DEFAULT_TOKENS, limits.max_tokens))
    return _read(fields, prompts, backbone, limits, tokens=tokens, likeliest=count, echo=echo, neutral=NEUTRAL)


def read_chat(body: dict[str, Any], backbone: Backbone, limits: Limits) -> Asked:
    """A body of ``/v1/chat/completions``."""
    fields = Fields(body)
    prompt = _encode(backbone, read_messages(fields.take("messages"), "messages"), "messages")
    wanted, most = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MOST_LOG_PROBS, None)
    if most is not None and not wanted:
        raise ApiError("top_logprobs needs logprobs: true", param="top_logprobs")
    room = backbone.context - len(prompt) if backbone.context else limits.max_tokens
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    tokens = fields.whole(name, 1, limits.max_tokens, max(1, min(room, limits.max_tokens)))
    return _read(
        fields, [prompt], backbone, limits,
        tokens=tokens, likeliest=(most or 0) if wanted else None, echo=False, neutral=NEUTRAL_CHAT, chat=True,
    )  # fmt: skip


def _read(
    fields: Fields,
    prompts: Sequence[tuple[int, ...]],
    backbone: Backbone,
    limits: Limits,
    *,
    tokens: int,
    likeliest: int | None,
    echo: bool,
    neutral: dict[str, tuple[object, ...]],
    chat: bool = False,
) -> Asked:
    """What both kinds of request say alike."""
    scale = read_scale(fields, limits)
    temperature = fields.number("temperature", 0, 2, 1.0)
    top_p = fields.number("top_p", 0, 1, 1.0)
    seed = fields.whole("seed", -(2**63), 2**63 - 1, None)
    n = fields.whole("n", 1, MOST_CHOICES, 1)
    if n * len(prompts) > MOST_CHOICES:
        raise ApiError(f"{n} answers to {len(prompts)} prompts, at most {MOST_CHOICES} in one request", param="n")
    stops = _stops(fields)
    stream, options = fields.flag("stream"), fields.take("stream_options")
    usage = _usage(options, stream)
    token_ids = fields.flag("return_tokens_as_token_ids")
    for ignored in ("user", "metadata", "safety_identifier", "prompt_cache_key"):
        fields.take(ignored)
    fields.neutral(neutral)
    fields.end()
    for prompt in prompts:
        if backbone.context and len(prompt) + tokens > backbone.context:
            raise ApiError(
                f"the prompt has {len(prompt)} tokens and {tokens} are to be written, but the model takes "
                f"{backbone.context} in all",
                param="messages" if chat else "prompt",
                code="context_length_exceeded",
            )
    # Answers to one prompt have seeds of their own, and the first one has that of the request.
    first = random.getrandbits(62) if seed is None else seed
    jobs = tuple(
        Job(
            prompt=prompt, scale=scale, max_tokens=tokens, stops=stops, likeliest=likeliest, echo=echo,
            sampling=Sampling(temperature, top_p, (first + number + 2**63) % 2**64 - 2**63),
        )
        for prompt in prompts
        for number in range(n)
    )  # fmt: skip
    texts = tuple(backbone.tokenizer.decode(job.prompt, skip_special_tokens=True) for job in jobs) if echo else ()
    return Asked(jobs=jobs, echo=texts, stream=stream, usage=usage, token_ids=token_ids, chat=chat)


def read_scale(fields: Fields, limits: Limits) -> float:
    """The scale of a request: its ``scale``, or what stands behind the model's name as in ``name@0.4``."""
    model = fields.text("model", limits.model)
    name, at, behind = model.partition("@")
    named = limits.scale
    if model != limits.model:
        try:
            named = float(behind) if at else named
        except ValueError:
            name = model
        if name != limits.model:
            raise ApiError(
                f"the model {model[:80]!r} is not served here; {limits.model!r} is",
                404,
                param="model",
                code="model_not_found",
            )
    low, high = limits.scales
    if not low <= named <= high:
        raise ApiError(f"model is {model[:80]!r}, expected a scale from {low:g} to {high:g}", param="model")
    return float(fields.number("scale", low, high, named))


def read_messages(messages: object, place: str) -> tuple[Message, ...]:
    """Chat messages with contents as strings."""
    if not isinstance(messages, list) or not messages:
        raise Fields({}).fault(place, messages, "a list of messages")
    found = []
    for number, message in enumerate(messages):
        where = f"{place}.{number}"
        if not isinstance(message, dict):
            raise Fields({}).fault(where, message, "an object with role and content")
        fields = Fields(message, f"{where}.")
        role = fields.text("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise fields.fault("role", role, "system, developer, user or assistant")
        fields.take("name")
        content = fields.take("content")
        if isinstance(content, list):
            content = "".join(_part(part, f"{where}.content.{i}") for i, part in enumerate(content))
        words = Fields({"content": content}, f"{where}.").text("content")
        fields.end()
        found.append({"role": "system" if role == "developer" else role, "content": words})
    return tuple(found)


def _part(part: object, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Fields({}).fault(where, part, 'a part {"type": "text", "text": ...}; this server takes no images')
    return part["text"]


def _prompts(fields: Fields) -> list[str | list[int]]:
    """A string, tokens, or a list of strings or of tokens."""
    given = fields.take("prompt")
    listed = given if isinstance(given, list) and not _tokens(given) else [given]
    if not listed or not all(isinstance(item, str) or _tokens(item) for item in listed):
        raise fields.fault("prompt", given, "a string, a list of token ids, or a list of either")
    if len(listed) > MOST_CHOICES:
        raise ApiError(f"prompt lists {len(listed)} prompts, at most {MOST_CHOICES} in one request", param="prompt")
    return listed


def _tokens(given: object) -> bool:
    return isinstance(given, list) and bool(given) and all(type(item) is int for item in given)


def _encode(backbone: Backbone, prompt: Prompt | list[int], name: str) -> tuple[int, ...]:
    """Token ids of a prompt."""
    if isinstance(prompt, list):
        known = backbone.model.get_input_embeddings().num_embeddings
        if wrong := [token for token in prompt if not 0 <= token < known]:
            raise ApiError(f"{name} has the token {wrong[0]}, expected numbers from 0 to {known - 1}", param=name)
        return tuple(prompt)
    if isinstance(prompt, str):
        prompt = Fields({name: prompt}).text(name)
    try:
        return backbone.tokens(prompt)
    except UserError as error:
        raise ApiError(str(error), param=name) from error


def _stops(fields: Fields) -> tuple[str, ...]:
    given = fields.take("stop", [])
    stops = [given] if isinstance(given, str) else given
    right = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not right or len(stops) > MOST_STOPS:
        raise fields.fault("stop", given, f"a text, or up to {MOST_STOPS} of them, none empty")
    return tuple(stops)


def _usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise ApiError("stream_options must be an object, and needs stream: true", param="stream_options")
    fields = Fields(options, "stream_options.")
    usage = fields.flag("include_usage")
    fields.take("include_obfuscation")
    fields.end()
    return usage
