"""The playground in a headless Chromium, with a keyboard and on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterator

import httpx
import pytest
from browsing import PHONE, launched, needs_chromium
from serving import served, tiny_engine

pytestmark = needs_chromium
PROMPT = "The pilot is"
PEOPLE = {"Ann": "female", "Bob": "male", "Sam": "neither", "Leo": "older"}


@pytest.fixture(scope="module")
def addresses() -> Iterator[tuple[str, str]]:
    """Of a server, and of one with a key."""
    with served(tiny_engine()) as plain, served(tiny_engine(), key="secret") as locked:
        yield plain, locked


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with launched() as browser:
        yield browser


@pytest.fixture
def page(browser) -> Iterator:
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if "//127.0.0.1:" not in request.url else None)
    yield page
    page.close()
    assert faults == []  # no error, and nothing from elsewhere


def settle(page) -> None:
    page.locator("#columns[aria-busy=false]").wait_for()


def percents(page, column: int) -> list[int]:
    texts = page.locator(".column").nth(column).locator(".bar span:last-child").all_inner_texts()
    return [int(text.removesuffix("%")) for text in texts]


def weighed(address: str, scale: float) -> list[int]:
    """What the server says of the people, in percent."""
    candidates = [{"text": f" {name}", "group": group} for name, group in PEOPLE.items()]
    body = {"prompt": PROMPT, "candidates": candidates, "scales": [scale]}
    groups = httpx.post(f"{address}/v1/dso/decide", json=body).json()["scales"][0]["groups"]
    return [math.floor(100 * groups[group] + 0.5) for group in PEOPLE.values()]


def test_answers_stand_side_by_side_with_bars(page, addresses: tuple[str, str]) -> None:
    page.goto(addresses[0])
    settle(page)
    titles = page.locator(".column h2 .at").all_inner_texts()
    assert titles == ["Scale 0.00", "Scale 0.50", "Scale 1.00"]
    for column in range(3):
        assert sum(percents(page, column)) in (99, 100, 101)
        assert page.locator(".column .said").nth(column).inner_text()
    assert page.locator(".column").first.locator(".bar span:first-child").all_inner_texts() == ["female", "male"]


def test_the_keyboard_does_all(page, addresses: tuple[str, str]) -> None:
    page.goto(addresses[0])
    settle(page)
    page.locator("#prompt").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(PROMPT)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("\n".join(f"{name} = {group}" for name, group in PEOPLE.items()))
    page.keyboard.press("Control+Enter")
    page.locator(".column.live .bar").nth(3).wait_for()
    settle(page)
    assert percents(page, 2) == weighed(addresses[0], 1)
    for _ in range(5):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "scale":
            break
    page.keyboard.press("End")
    page.locator('.column.live[data-scale="2"]').wait_for()
    settle(page)
    assert page.locator("#value").inner_text() == "2.00"
    assert percents(page, 2) == weighed(addresses[0], 2)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # keeps a column
    page.locator(".column").nth(3).wait_for()
    settle(page)
    assert percents(page, 2) == percents(page, 3) == weighed(addresses[0], 2)


def test_a_phone_shows_one_column_and_nothing_sticks_out(page, addresses: tuple[str, str]) -> None:
    page.set_viewport_size(PHONE)
    page.goto(addresses[0])
    settle(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    boxes = [page.locator(".column").nth(number).bounding_box() for number in range(3)]
    assert len({box["x"] for box in boxes}) == 1
    assert boxes[2]["y"] < boxes[0]["y"]  # the slider's column is right below the slider
    for button in page.locator("button:visible").all():
        assert button.bounding_box()["height"] >= 32


def test_a_key_is_asked_for_and_errors_are_shown(page, addresses: tuple[str, str]) -> None:
    page.goto(addresses[1])
    page.locator("#error").wait_for()
    assert "API key" in page.locator("#error").inner_text()
    page.locator("#key").fill("secret")
    page.keyboard.press("Enter")
    settle(page)
    assert sum(percents(page, 0)) in (99, 100, 101)
    assert page.locator("#error").is_hidden()
    page.locator("#candidates").fill("Ann = female\nAnn = male")
    page.keyboard.press("Control+Enter")
    page.locator("#error").wait_for()
    assert "same text" in page.locator("#error").inner_text()
