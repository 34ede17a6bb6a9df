"""lm-evaluation-harness on the steered model object, on a local file: ARC-Easy's form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dso.errors import UserError
from dso.evaluation.benchmarks.arc import Arc
from dso.evaluation.benchmarks.harness import HarnessTask
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.registry import measure
from dso.models.backbone import Backbone
from dso.steering.model import Steering

TASK = r"""
task: local_arc
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
BROKEN = TASK.replace("local_arc", "broken").replace("FILE", "nowhere.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    made = tmp_path_factory.mktemp("harness")
    (made / "local_arc.yaml").write_text(TASK.replace("FILE", str(made / "arc.jsonl")))
    (made / "broken.yaml").write_text(BROKEN)
    return made


def test_it_agrees_with_our_own_scorer_base_and_steered(
    folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    rng = np.random.default_rng(0)
    words = ["rain", "iron", "oaks", "moss", "wind", "snow"]
    questions = [(f"What is {n}?", list(rng.permutation(words)[:4]), int(rng.integers(4))) for n in range(12)]
    rows = [{"question": q, "options": options, "answer": answer} for q, options, answer in questions]
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    steering = Steering.for_model(backbone.model)
    for operator in steering.operators.values():
        operator.a.data = torch.randn_like(operator.a)
    handle = steering.attach(backbone.model, 0.0)
    task = HarnessTask("local_arc", folder)
    found = measure(task, backbone, handle)
    rows_of = task.compare(found.base, found.steered)
    (row,) = rows_of.values()
    assert list(rows_of) == ["local_arc, acc"] and task.items == 12
    own = Arc(questions)
    handle.scale = 0.0
    base = own.ask(Probe(backbone)).right
    handle.scale = 1.0
    steered = own.ask(Probe(backbone)).right
    assert (row.first.value, row.second.value) == pytest.approx((base.mean(), steered.mean()))
    assert (base != steered).any()
    gained = steered.astype(float) - base
    # Paired by documents: the width is that of their differences.
    assert row.difference.high - row.difference.low == pytest.approx(
        2 * 2.200985 * gained.std(ddof=1) / np.sqrt(12), rel=1e-3
    )
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_run_is_one_line(folder: Path, backbone: Backbone) -> None:
    with pytest.raises(UserError, match="has no task 'mml'; did you mean mmlu"):
        HarnessTask("mml", folder)
    assert {HarnessTask(name, folder).name for name in ("mmlu", "gpqa_main_zeroshot", "ifeval", "arc_easy", "bbq")}
    with pytest.raises(UserError) as found:
        HarnessTask("broken", folder).ask(Probe(backbone))
    assert str(found.value).startswith("harness task 'broken' cannot be run: ")
    assert "\n" not in str(found.value) and "nowhere.jsonl" in str(found.value)
