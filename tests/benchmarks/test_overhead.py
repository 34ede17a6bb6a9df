"""The benchmark of overhead: every variant gives what it is named for, and ratios are of the same round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from dso.steering.handle import attached
from tools.bench import overhead
from tools.bench.cli import main


def test_ratios_are_of_a_round() -> None:
    row = {"base": [1.0, 2.0, 10.0], "hooks": [1.1, 2.1, 30.0]}
    found = overhead._ratios(row)
    assert found["base"] == {"seconds": 2.0, "ratio": 1.0, "low": 1.0, "high": 1.0}
    # 1.1, 1.05 and 3: the median is 1.1, the quartiles lie half way to its neighbours
    assert found["hooks"] == pytest.approx({"seconds": 2.1, "ratio": 1.1, "low": 1.075, "high": 2.05})


def test_variants_share_weights_and_nothing_else() -> None:
    model = tiny_llama()
    found = overhead._variants(model, overhead._steering(model, "scale"), 2)
    assert [len(attached(one)) for one in found.values()] == [0, 1, 1, 0, 0, 0] and attached(model) == []
    weights = [one.get_input_embeddings().weight.data_ptr() for one in (model, *found.values())]
    assert len(set(weights)) == 1
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    base, hooks, rows, merged, lora, again = (one(ids).logits for one in found.values())
    assert torch.equal(base, again) and not torch.allclose(base, hooks) and not torch.allclose(hooks, rows)
    torch.testing.assert_close(merged, hooks, atol=1e-5, rtol=1e-5)
    assert (lora - hooks).abs().max() < (base - hooks).abs().max()  # all but the final norm's slopes


def test_it_runs(tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--batch", "2", "--prompt", "8", "--new", "2", "--rounds", "2", "--clock", "cpu"]
    assert main(["overhead", "--model", str(model_folder), *options, "--results", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert set(found["eager"]) == {"prefill", "decode"} and found["rounds"] == 2 and found["clock"] == "cpu"
    assert set(found["eager"]["decode"]) == {"base", "hooks", "per row", "merged", "lora", "base again"}
    assert "prefill" in capsys.readouterr().out
