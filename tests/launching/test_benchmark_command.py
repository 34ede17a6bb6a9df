"""``dso benchmark``: what it prints and writes, and that what is missing or broken takes nothing with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tiny import tiny_llama

from dso.steering.model import Steering
from launch.cli import main

CROWS = ",sent_more,sent_less,stereo_antistereo,bias_type\n" + "".join(
    f"{n},The old {word}.,The new {word}.,stereo,{kind}\n"
    for n, (word, kind) in enumerate(zip("abcdefgh", ["age", "religion"] * 4, strict=True))
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        return Outcome(main(["benchmark", *map(str, arguments)]), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def steering(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    torch.manual_seed(1)
    made = Steering.for_model(tiny_llama(), base_model=str(model_folder), groups=("female", "male"))
    for operator in made.operators.values():
        operator.a.data = 0.3 * torch.randn_like(operator.a)
    folder = tmp_path_factory.mktemp("steering")
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "crows_pairs").mkdir(parents=True)
    (folder / "crows_pairs" / "crows_pairs_anonymized.csv").write_text(CROWS)
    (folder / "arc").mkdir()
    (folder / "arc" / "ARC-Easy_test.csv").write_text('"Q?","a","bb","ccc","d","B"\n"R?","a","b","c","d","A"\n')
    return folder


def test_figures_are_printed_and_written(call, steering: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = call(steering, "crows_pairs", "arc", "--data", data, "--json", tmp_path / "b.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("crows_pairs: 8 items (Nangia et al., EMNLP 2020")
    assert lines[2].endswith("steered - base [95%]")
    record = json.loads((tmp_path / "b.json").read_text())
    assert (record["steering"], record["scale"], record["left_out"]) == (str(steering), 1.0, {})
    row = record["benchmarks"]["crows_pairs"]["figures"]["difference in nats"]
    assert row["difference"][0] == pytest.approx(row["steered"][0] - row["base"][0])
    assert row["difference"][1] < row["difference"][0] < row["difference"][2]
    # At scale 0 nothing differs; the base model alone has no second column.
    code, out, _ = call(steering, "arc", "--data", data, "--scale", "0")
    accuracy = next(line for line in out.splitlines() if line.startswith("accuracy")).split()
    assert code == 0 and accuracy[-1] == "0.0"
    code, out, _ = call(
        "none", "arc", "--data", data, "--model", json.loads((steering / "dso_config.json").read_text())["base_model"]
    )
    assert code == 0 and "steered" not in out


def test_what_is_missing_is_named_and_the_rest_goes_on(call, steering: Path, data: Path, tmp_path: Path) -> None:
    code, out, err = call(steering, "bbq", "arc", "--data", data, "--json", tmp_path / "b.json")
    assert code == 3
    assert err.startswith(f"dso: bbq: {data / 'bbq' / '*.jsonl'} is not there. Take the files of data/ of github.com")
    assert err.count("\n") == 1 and "arc: 2 items" in out
    assert list(json.loads((tmp_path / "b.json").read_text())["left_out"]) == ["bbq"]
    # A file of another version, likewise; of "all" what is not there is no failure.
    (data / "crows_pairs" / "crows_pairs_anonymized.csv").write_text("a,b\n1,2\n")
    code, out, err = call(steering, "crows_pairs", "arc", "--data", data)
    assert code == 3 and "lacks the column 'sent_more'; is it another version?" in err and "arc: 2 items" in out
    (data / "crows_pairs" / "crows_pairs_anonymized.csv").write_text(CROWS)
    code, out, err = call(steering, "all", "--data", data)
    assert code == 0 and err.count("dso: left out: ") == 8
    assert call(steering, "bbq", "--data", data).code == 2  # nothing could be measured
    assert call(steering, "crows", "--data", data).err.startswith("dso: unknown benchmark 'crows'; did you mean")
    assert "name a benchmark" in call(steering, "--data", data).err


def test_an_item_that_the_model_cannot_take_stops_its_benchmark_only(call, steering: Path, data: Path) -> None:
    (data / "arc" / "ARC-Easy_test.csv").write_text(f'"{"long " * 200}","a","b","c","d","B"\n')
    code, out, err = call(steering, "arc", "crows_pairs", "--data", data)
    assert code == 3 and "tokens, but" in err and "crows_pairs: 8 items" in out


def test_spillover_goes_into_the_card(call, steering: Path, data: Path, tmp_path: Path) -> None:
    (steering / "README.md").write_text("# Name\n\n## Intended use\n\nmine\n")
    code, out, err = call(steering, "crows_pairs", "--data", data, "--write-card", "--json", tmp_path / "b.json")
    assert code == 0, err
    assert out.splitlines()[-1].split() == ["card", str(steering / "README.md")]
    card = (steering / "README.md").read_text()
    assert card.startswith("# Name\n\n## Spillover\n\nBias about what") and card.endswith("## Intended use\n\nmine\n")
    rows = json.loads((tmp_path / "b.json").read_text())["spillover"]["rows"]
    assert [row["attribute"] for row in rows] == ["age", "religion"]
    assert Steering.from_pretrained(steering).config.groups == (
        "female",
        "male",
    )  # the card is no part of what is signed
    (steering / "README.md").unlink()
    assert "has a card" in call(steering, "crows_pairs", "--data", data, "--write-card").err
    assert "name one instead of none" in call("none", "crows_pairs", "--data", data, "--spillover").err
    code, _, err = call(steering, "arc", "--data", data, "--spillover")
    assert code == 3 and "add crows_pairs" in err
