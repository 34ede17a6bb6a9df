"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch
from serving import MODEL, served, strong_steering, tiny_backbone, tiny_engine, wait_until

from dso.decisions.decision import Candidate, Decision
from dso.exports.merge import Merging
from dso.exports.probe import read_probe
from dso.exports.verify import verify_url
from dso.serve.engine import Engine

PROMPT = "The nurse said"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(max_rows=16)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(engine: Engine, prompt, scale: float, tokens: int) -> str:
    """What the model writes by itself, by transformers' generate; the engine rests while it runs."""

    def write() -> str:
        engine.handle.scale = scale
        return engine.backbone.generate(prompt, max_new_tokens=tokens)

    return engine.run(write).result()


def log_probs(engine: Engine, tokens, scale: float) -> torch.Tensor:
    """(P, V) log-probabilities behind each token, in one pass of the steered model."""

    def score() -> torch.Tensor:
        engine.handle.scale = scale
        with torch.no_grad():
            return engine.backbone.model(torch.tensor([list(tokens)]), use_cache=False).logits[0].log_softmax(-1)

    return engine.run(score).result()


def ask(address: str, requests: list[dict], at_once: int) -> list[str]:
    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            gate = asyncio.Semaphore(at_once)

            async def one(request: dict) -> str:
                async with gate:
                    return (await client.completions.create(model=MODEL, **request)).choices[0].text

            return await asyncio.gather(*map(one, requests))

    return asyncio.run(all_of_them())


def test_200_requests_at_once_are_answered_as_each_would_be_alone(engine: Engine, address: str) -> None:
    requests = [
        {"prompt": "The nurse is " + "and so on " * (number % 5) + chr(97 + number % 26), "max_tokens": 3 + number % 9,
         "extra_body": {"scale": (0.0, 0.25, 0.5, 1.0, 2.0)[number % 5]}, "seed": number,
         "temperature": 0.0 if number % 2 else 1.0, "top_p": 1.0 if number % 4 else 0.9}
        for number in range(200)
    ]  # fmt: skip
    together = ask(address, requests, 200)
    assert together == ask(address, requests, 1)
    for number in range(1, 80, 2):  # the greedy ones have an independent reference
        request = requests[number]
        expected = alone(engine, request["prompt"], request["extra_body"]["scale"], request["max_tokens"])
        assert together[number] == expected
    assert len(set(together)) > 100
    assert engine.running == engine.waiting == 0


def test_a_completion(engine: Engine, client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=9, temperature=0)
    choice = made.choices[0]
    assert choice.text == alone(engine, PROMPT, 1.0, 9)  # the server's own scale is 1
    assert (made.object, made.model, choice.finish_reason, choice.logprobs) == (
        "text_completion",
        MODEL,
        "length",
        None,
    )
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (14, 9, 23)


def test_the_scale_may_stand_behind_the_models_name(engine: Engine, client: openai.OpenAI) -> None:
    for name, scale in ((f"{MODEL}@0.25", 0.25), (f"{MODEL}@0", 0.0)):
        made = client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0)
        assert made.choices[0].text == alone(engine, PROMPT, scale, 8)
    assert [model.id for model in client.models.list()] == [MODEL]


def test_a_chat_whole_and_in_pieces(engine: Engine, client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": CHAT, "max_tokens": 8, "temperature": 0, "extra_body": {"scale": 0.5}}
    whole = client.chat.completions.create(**options)
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == alone(engine, CHAT, 0.5, 8)
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    chunks = list(
        client.chat.completions.create(
            **options | {"messages": parts}, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len(chunks) > 3
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].delta.role for c in chunks if c.choices] == ["assistant", *[None] * (len(chunks) - 2)]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_log_probabilities_are_those_of_the_steered_model(engine: Engine, client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=1, logprobs=5, temperature=1.7, seed=4,
        extra_body={"scale": 0.5, "return_tokens_as_token_ids": True},
    ).choices[0].logprobs  # fmt: skip
    expected = log_probs(engine, engine.backbone.tokens(PROMPT), 0.5)[-1]
    best = expected.topk(5)
    assert made.top_logprobs[0] == pytest.approx(
        {f"token_id:{i}": v for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)}, abs=1e-4
    )
    chosen = int(made.tokens[0].removeprefix("token_id:"))
    assert made.token_logprobs == pytest.approx([float(expected[chosen])], abs=1e-4)


def test_dso_verify_knows_the_scale_that_is_served(model_folder: Path, tmp_path: Path) -> None:
    backbone = tiny_backbone()
    steering = strong_steering(backbone.model, "scale")
    Merging.of(steering, 0.5, str(model_folder)).write(tmp_path / "merged")
    probe = read_probe(tmp_path / "merged")
    with served(Engine(backbone, steering.attach(backbone.model))) as address:
        for scale, same in ((0.5, True), (0, False), (1, False)):
            verdict, note = verify_url(address, f"{MODEL}@{scale}", probe)
            assert (verdict.passed, note) == (same, "")


def test_echo_scores_the_prompt(engine: Engine, client: openai.OpenAI) -> None:
    made = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=0, logprobs=0, echo=True, extra_body={"scale": 2.0}
    ).choices[0]
    tokens = engine.backbone.tokens(PROMPT)
    table = log_probs(engine, tokens, 2.0)
    assert made.text == PROMPT and made.logprobs.tokens == list(PROMPT)
    assert made.logprobs.text_offset == list(range(len(PROMPT)))
    assert made.logprobs.token_logprobs[0] is None
    expected = [float(table[place, token]) for place, token in enumerate(tokens[1:])]
    assert made.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    longer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, echo=True, temperature=0).choices[0]
    assert longer.text == PROMPT + alone(engine, PROMPT, 1.0, 5)


def test_a_chats_log_probabilities(engine: Engine, client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model=MODEL, messages=CHAT, max_tokens=2, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    first = made.logprobs.content[0]
    values = log_probs(engine, engine.backbone.tokens(CHAT), 1.0)[-1].topk(2).values.tolist()
    assert [top.logprob for top in first.top_logprobs] == pytest.approx(values, abs=1e-4)
    assert first.logprob == pytest.approx(values[0], abs=1e-4)
    assert (first.token, first.bytes) == (first.top_logprobs[0].token, first.top_logprobs[0].bytes)


def test_a_seed_draws_the_same_again_and_several_answers_differ(client: openai.OpenAI) -> None:
    def drawn(seed: int | None, n: int = 1) -> list[str]:
        made = client.completions.create(model=MODEL, prompt=[PROMPT, [70, 71]], max_tokens=9, seed=seed, n=n)
        assert [choice.index for choice in made.choices] == list(range(2 * n))
        return [choice.text for choice in made.choices]

    assert drawn(7) == drawn(7) != drawn(8)
    three = drawn(7, 3)
    assert [three[0], three[3]] == drawn(7)
    assert len(set(three[:3])) == 3
    assert drawn(None) != drawn(None)


def test_a_stop_ends_an_answer(engine: Engine, client: openai.OpenAI) -> None:
    text = alone(engine, PROMPT, 1.0, 12)
    stop = text[5:7]
    expected = text[: text.index(stop)]
    made = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stop=[stop, "never"])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (expected, "stop")


def test_decide_weighs_candidates_at_each_scale(engine: Engine, address: str) -> None:
    candidates = [
        {"text": " Ann", "group": "female"},
        {"text": " Eve", "group": "female"},
        {"text": " Bob", "group": "male"},
    ]
    body = {"prompt": PROMPT, "candidates": candidates, "scales": [0, 0.5, 2]}
    made = httpx.post(f"{address}/v1/dso/decide", json=body).json()
    decision = Decision(
        id="1", context="c", kind="ambiguous", prompt=PROMPT, candidates=tuple(Candidate(**c) for c in candidates)
    )
    for point, scale in zip(made["scales"], (0.0, 0.5, 2.0), strict=True):

        def score(scale: float = scale):
            engine.handle.scale = scale
            return engine.backbone.score([decision], keep=False)

        scores = engine.run(score).result()
        shares = scores.policy()[0].exp().tolist()
        assert [c["probability"] for c in point["candidates"]] == pytest.approx(shares)
        assert point["groups"] == pytest.approx({"female": shares[0] + shares[1], "male": shares[2]})
        assert point["answer_mass"] == pytest.approx(float(scores.answer_mass()[0]))
    assert made["scales"][0]["groups"] != made["scales"][2]["groups"]
    assert engine.backbone._encoded == {}  # a server that runs for months keeps nothing of what it was asked


# ---------------------------------------------------------------- clients that leave


def test_a_client_that_leaves_a_stream_frees_its_row(engine: Engine, client: openai.OpenAI, address: str) -> None:
    before = metric(address, "dso_clients_left_total")
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=400, stream=True)
    next(iter(stream))
    assert engine.running == 1
    stream.close()
    wait_until(lambda: engine.running == 0)
    wait_until(lambda: metric(address, "dso_clients_left_total") == before + 1)


def test_a_client_that_gives_up_waiting_frees_its_row(engine: Engine, client: openai.OpenAI, address: str) -> None:
    before = metric(address, "dso_clients_left_total")
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.1).completions.create(model=MODEL, prompt=PROMPT, max_tokens=400, n=16)
    wait_until(lambda: engine.running == engine.waiting == 0)
    wait_until(lambda: metric(address, "dso_clients_left_total") == before + 1)


def metric(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def test_metrics_count_requests_and_tokens(client: openai.OpenAI, address: str) -> None:
    names = (
        "dso_prompt_tokens_total",
        "dso_generated_tokens_total",
        'dso_requests_total{path="/v1/completions",status="200"}',
    )
    before = [metric(address, name) for name in names]
    client.completions.create(model=MODEL, prompt="abcde", max_tokens=3, temperature=0)
    assert [metric(address, name) for name in names] == [before[0] + 5, before[1] + 3, before[2] + 1]
    assert metric(address, "dso_running") == metric(address, "dso_waiting") == 0
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}


# ---------------------------------------------------------------- bad input

WORD = {"model": MODEL, "prompt": "a"}
TALK = {"model": MODEL, "messages": [{"role": "user", "content": "a"}]}
PAIR = {"prompt": "a", "candidates": [{"text": " b", "group": "x"}, {"text": " c", "group": "y"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "said"),
    [
        ("completions", {"model": MODEL}, "prompt", "prompt is null"),
        ("completions", WORD | {"prompt": []}, "prompt", "prompt is []"),
        ("completions", WORD | {"prompt": [1, "a"]}, "prompt", "list of either"),
        ("completions", WORD | {"prompt": [9999]}, "prompt", "token 9999, expected numbers from 0 to 257"),
        ("completions", WORD | {"prompt": ""}, "prompt", "the prompt is empty"),
        ("completions", WORD | {"prompt": "\ud800"}, "prompt", "whole characters"),
        ("completions", WORD | {"prompt": "a" * 505}, "prompt", "505 tokens and 16 are to be written"),
        ("completions", WORD | {"scale": 2.5}, "scale", "scale is 2.5, expected a number from 0 to 2"),
        ("completions", WORD | {"scale": True}, "scale", "scale is true"),
        ("completions", WORD | {"scale": "1"}, "scale", 'scale is "1"'),
        ("completions", WORD | {"model": f"{MODEL}@3"}, "model", "from 0 to 2"),
        ("completions", WORD | {"max_tokens": 401}, "max_tokens", "from 1 to 400"),
        ("completions", WORD | {"max_tokens": 0}, "max_tokens", "from 1 to 400"),
        ("completions", WORD | {"temperature": -1}, "temperature", "from 0 to 2"),
        ("completions", WORD | {"n": 129}, "n", "from 1 to 128"),
        ("completions", WORD | {"prompt": ["a", "b"], "n": 65}, "n", "at most 128"),
        ("completions", WORD | {"stop": ["a"] * 5}, "stop", "up to 4"),
        ("completions", WORD | {"stop": ""}, "stop", "none empty"),
        ("completions", WORD | {"logprobs": 21}, "logprobs", "from 0 to 20"),
        ("completions", WORD | {"seed": 2**63}, "seed", "whole number"),
        ("completions", WORD | {"stream": 1}, "stream", "true or false"),
        ("completions", WORD | {"stream_options": {}}, "stream_options", "needs stream: true"),
        ("completions", WORD | {"frequency_penalty": 0.5}, "frequency_penalty", "does not implement"),
        ("completions", WORD | {"scael": 1}, "scael", "unrecognized field scael"),
        ("chat/completions", TALK | {"messages": []}, "messages", "a list of messages"),
        ("chat/completions", TALK | {"messages": [{"role": "user"}]}, "messages.0.content", "expected a string"),
        ("chat/completions", TALK | {"messages": [{"role": "cook", "content": "a"}]}, "messages.0.role", '"cook"'),
        ("chat/completions", TALK | {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ("chat/completions", TALK | {"tools": [{}]}, "tools", "does not implement"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0",
            "takes no images",
        ),
        ("dso/decide", PAIR | {"candidates": []}, "candidates", "a list of 2 to 32"),
        ("dso/decide", PAIR | {"scales": [0, 3]}, "scales.1", "from 0 to 2"),
        ("dso/decide", PAIR | {"candidates": [{"text": "b", "group": "x"}] * 2}, None, "have the same text"),
        ("dso/decide", PAIR | {"prompt": 3}, "prompt", "a string or a list"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_openais_shape(
    address: str, path: str, body: dict, param: str | None, said: str
) -> None:
    headers = {"Content-Type": "application/json"}
    reply = httpx.post(f"{address}/v1/{path}", content=json.dumps(body), headers=headers)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert said in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status", "said"),
    [
        (b"{", "application/json", 400, "no JSON"),
        (b"[1]", "application/json", 400, "expected a JSON object"),
        (b'{"scale": NaN}', "application/json", 400, "NaN"),
        (b"[" * 50_000, "application/json", 400, "no JSON"),
        (b"\xff", "application/json", 400, "no JSON"),
        (b"a" * 100_001, "application/json", 413, "more than 100000 bytes"),
        (b"{}", "text/plain", 415, "application/json"),
    ],
)
def test_a_body_that_is_no_json_is_refused(address: str, content: bytes, kind: str, status: int, said: str) -> None:
    reply = httpx.post(f"{address}/v1/completions", content=content, headers={"Content-Type": kind})
    assert reply.status_code == status
    assert said in reply.json()["error"]["message"]


def test_unknown_models_and_paths(client: openai.OpenAI, address: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'tiny' is") as refused:
        client.completions.create(model="gpt-9", prompt="a")
    assert refused.value.code == "model_not_found"
    for reply, status in ((httpx.get(f"{address}/v1/nothing"), 404), (httpx.get(f"{address}/v1/completions"), 405)):
        assert (reply.status_code, reply.json()["error"]["type"]) == (status, "invalid_request_error")


# ---------------------------------------------------------------- keys, queues, endings


def test_a_key_is_asked_for_where_one_is_set() -> None:
    with served(tiny_engine(), key="secret") as address:
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
        assert right.completions.create(model=MODEL, prompt="a", max_tokens=1).choices[0].finish_reason
        for key in ("wrong", "secret2"):
            with pytest.raises(openai.AuthenticationError) as refused:
                right.with_options(api_key=key).models.list()
            assert refused.value.code == "invalid_api_key"
        assert httpx.post(f"{address}/v1/dso/decide", json=PAIR).status_code == 401
        assert [httpx.get(address + path).status_code for path in ("/", "/health", "/metrics")] == [200] * 3


def test_a_full_queue_turns_requests_away_and_a_server_that_stops_finishes_what_it_began() -> None:
    engine = tiny_engine(max_rows=1, max_queue=1)
    with served(engine) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=150, temperature=0, stream=True)
        chunks = iter(stream)
        text = next(chunks).choices[0].text
        waiting = threading.Thread(target=client.completions.create, kwargs=WORD | {"max_tokens": 1}, daemon=True)
        waiting.start()
        wait_until(lambda: engine.waiting == 1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model=MODEL, prompt=PROMPT)
        assert refused.value.code == "queue_full"
        assert engine.running == 1
    assert not engine.alive  # the server was told to stop in the middle of the stream, and is gone
    finished = text + "".join(chunk.choices[0].text for chunk in chunks)
    engine = tiny_engine()
    assert finished == alone(engine, PROMPT, 1.0, 150)
    engine.close()
    waiting.join(120)
    assert not waiting.is_alive()
