"""The server as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
import torch
from serving import MODEL, served, tiny_engine, wait_until

from dso.serve.engine import Engine


@pytest.fixture(scope="module")
def engine() -> Engine:
    return tiny_engine(max_rows=16)


@pytest.fixture(scope="module")
def address(engine: Engine) -> Iterator[str]:
    with served(engine) as url:
        yield url


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def alone(engine: Engine, prompt, scale: float, tokens: int) -> str:
    """What the model writes by itself, by transformers' generate; the engine rests while it runs."""

    def write() -> str:
        engine.handle.scale = scale
        return engine.backbone.generate(prompt, max_new_tokens=tokens)

    return engine.run(write).result()


def test_200_requests_at_once_are_answered_as_each_would_be_alone(engine: Engine, address: str) -> None:
    asked = [
        {"prompt": "The nurse is " + "and so on " * (number % 5) + chr(97 + number % 26), "max_tokens": 3 + number % 9,
         "extra_body": {"scale": (0.0, 0.25, 0.5, 1.0, 2.0)[number % 5]}, "seed": number,
         "temperature": 0.0 if number % 2 else 1.0, "top_p": 1.0 if number % 4 else 0.9}
        for number in range(200)
    ]  # fmt: skip

    async def ask(at_once: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            gate = asyncio.Semaphore(at_once)

            async def one(request: dict) -> str:
                async with gate:
                    return (await client.completions.create(model=MODEL, **request)).choices[0].text

            return await asyncio.gather(*map(one, asked))

    together = asyncio.run(ask(200))
    greedy = [number for number in range(200) if number % 2][:40]
    assert [together[number] for number in greedy] == [
        alone(engine, asked[number]["prompt"], asked[number]["extra_body"]["scale"], asked[number]["max_tokens"])
        for number in greedy
    ]
    assert together == asyncio.run(ask(1))
    assert len(set(together)) > 100
