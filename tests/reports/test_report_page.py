"""The page in a headless Chromium, and the folder that holds it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsing import PHONE, launched, needs_chromium
from studies import study

from dso.errors import UserError
from dso.evaluation.study import Study, read_study
from dso.reports.digest import digests
from dso.reports.drawing import labelled
from dso.reports.figures import pareto
from dso.reports.page import render, write_report
from launch.cli import main

DESKTOP = {"width": 1280, "height": 900}
SMALLEST = "Math.min(...[...document.querySelectorAll('main *, header *')].filter(e => e.childNodes.length && " \
    "[...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !e.closest('svg') && e.offsetParent)" \
    ".map(e => parseFloat(getComputedStyle(e).fontSize)))"  # fmt: skip
DRAWN = "Math.min(...[...document.querySelectorAll('svg text')].map(e => " \
    "parseFloat(getComputedStyle(e).fontSize) * e.ownerSVGElement.getScreenCTM().a))"  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study") / "report"
    assert write_report(study(), place) == place / "report.html"
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator:
    with launched() as browser:
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: faults.append(request.url) if not request.url.startswith("file:") else None)
        page.goto(f"file://{folder}/report.html")
        yield page
    assert faults == []  # no error, no word on the console, and nothing from elsewhere


@needs_chromium
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_is_legible_and_nothing_sticks_out(page, size: dict[str, int]) -> None:
    page.set_viewport_size(size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.evaluate(SMALLEST) >= 15
    assert page.evaluate(DRAWN) >= 12


@needs_chromium
def test_pictures_have_names_and_numbers(page) -> None:
    page.set_viewport_size(DESKTOP)
    pictures = page.get_by_role("img")
    assert pictures.count() == 6
    for number in range(6):
        picture = pictures.nth(number)
        title, text = (picture.locator(f"> {tag}").text_content() for tag in ("title", "desc"))
        assert title
        assert "table" in text or "same on the scale" in text
    page.get_by_text("Table of contexts").click()
    table = page.get_by_role("region", name="Contexts", exact=True)
    assert table.locator("tbody tr").count() == 30
    assert table.locator("tbody tr").first.inner_text().split("\t")[0] == "janitor"


@needs_chromium
def test_in_print_no_table_is_cut_and_none_is_hidden(page) -> None:
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 1032, "height": 700})  # A4, landscape, within its margins
    try:
        assert page.evaluate("document.documentElement.scrollWidth") <= 1032
        assert page.locator("nav").is_hidden()
        boxes = page.locator(".box").evaluate_all("all => all.map(e => [e.scrollWidth, e.clientWidth, e.clientHeight])")
        assert all(wide <= shown and high > 0 for wide, shown, high in boxes)
    finally:
        page.emulate_media(media="screen")


class Page(HTMLParser):
    """The ids of a page, what it refers to, and its tags."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "src", "xlink:href"):
                self.addresses.append(value or "")


def test_the_page_stands_by_itself(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.ids) == len({*page.ids})
    elsewhere = [address for address in page.addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert elsewhere == []
    assert {address[1:] for address in page.addresses if address[0] == "#"} <= {*page.ids}
    assert not {"script", "link", "img", "iframe"} & {*page.tags}
    used = {*re.findall(r"url\(#([^)]*)\)", text)}
    assert used
    assert used <= {*page.ids}


def test_names_from_a_study_are_text(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "&lt;null&gt;" in text  # of the config
    assert "&lt;long&gt;" in text  # of an answer
    made = study()
    odd = replace(made.methods[1], title="<script>$x_1$ & co")
    odd = replace(odd, trials=odd.trials[:1])
    drawn, _ = render(Study(about={}, base=made.base, methods=(odd,)))
    assert "script" not in Page(drawn).tags
    assert "&lt;script&gt;$x_1$ &amp; co" in drawn


def test_the_folder_has_the_study_and_its_pictures(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "report.html", "study.json", "pareto.png", "pareto-log-odds.png", "curves.png", "contexts.png",
        "preferences.png", "sparsity.png",
    }  # fmt: skip
    assert read_study(folder / "study.json").to_json() == study().to_json()
    assert (folder / "pareto.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("count", [1, 24])
def test_a_legend_of_many_methods_takes_nothing_from_the_plot(count: int) -> None:
    made = study()
    many = [
        replace(made.methods[0], name=f"m{n}", title=f"method {n}, whose name is so long that it takes two lines")
        for n in range(count)
    ]
    crowded = replace(made, methods=tuple(many))
    figure = pareto(crowded, digests(crowded), "bias")
    figure.savefig(io.BytesIO())  # what lays it out
    assert all(2.4 < axes.get_position().height * figure.get_figheight() < 3.4 for axes in figure.axes)


def test_a_curve_that_explodes_does_not_press_the_others_flat() -> None:
    made = study()
    chosen = [d.figures["neutral_kl"].value for d in digests(made) if d.figures and d.method.kind != "null"]
    caa = next(method for method in made.methods if method.name == "caa")
    *points, last = caa.trials[0].points
    assert caa.trials[0].chosen != last.result.scale
    far = replace(caa.trials[0], points=(*points, replace(last, neutral_kl=50.0)))
    methods = [replace(m, trials=(far, *m.trials[1:])) if m is caa else m for m in made.methods]
    before, after = (
        pareto(each, digests(each), "bias").axes[0] for each in (made, replace(made, methods=tuple(methods)))
    )
    assert before.get_xlim()[1] < 5 * max(chosen) and "up to" not in before.get_xlabel()
    assert after.get_xlim()[1] == pytest.approx(5 * max(chosen))
    assert after.get_xlabel().endswith(f"up to {5 * max(chosen):.2g}")


def bare() -> Study:
    """As little as a study can have: one method that failed."""
    made = study()
    return Study(about={}, base=made.base, methods=(replace(made.methods[0], trials=(), failed="out of memory"),))


def test_the_command_draws_a_study_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare().write(tmp_path / "study.json")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "again" / "report.html")
    text = (tmp_path / "again" / "report.html").read_text(encoding="utf-8")
    assert "failed: out of memory" in text
    assert main(["report", str(tmp_path / "study.json")]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text  # the same study, the same page
    (tmp_path / "report.html").unlink()
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert main(["report", f"~/{tmp_path.name}"]) == 0
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text
    capsys.readouterr()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    told = f"dso: {tmp_path / 'nothing'}: is not there; name the folder that dso compare wrote, or its study.json\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', "[1]"])
def test_what_is_no_study_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/report: the report cannot be written: .*--out"):
        write_report(bare(), tmp_path / "file" / "report")


def test_ids_of_pictures_do_not_meet() -> None:
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt" height="9pt" '
        'viewBox="0 0 9 9"><defs><path id="m"/></defs><g clip-path="url(#p)"><use xlink:href="#m"/></g></svg>'
    )
    assert labelled(svg, "a", "T", "x < y") == (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 9 9" '
        'role="img" aria-labelledby="a-title a-desc"><title id="a-title">T</title><desc id="a-desc">x &lt; y</desc>'
        '<defs><path id="a-m" /></defs><g clip-path="url(#a-p)"><use xlink:href="#a-m" /></g></svg>'
    )
