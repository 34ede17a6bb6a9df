"""lm-evaluation-harness on the steered model object, on a local file: ARC-Easy's form."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dso.errors import UserError
from dso.evaluation.benchmarks.arc import Arc
from dso.evaluation.benchmarks.crows_pairs import CrowsPairs, Pair
from dso.evaluation.benchmarks.harness import HarnessTask
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.registry import measure
from dso.models.backbone import Backbone
from dso.steering.model import Steering

LOCAL = """\
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice"""
TASK = (
    LOCAL
    + r"""
task: local_arc
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
)
CROWS = (
    LOCAL
    + r"""
task: local_crows_pairs
doc_to_text: ""
doc_to_target: 0
doc_to_choice: !function crows.doc_to_choice
target_delimiter: ""
process_results: !function crows.process_results
metric_list:
  - {metric: likelihood_diff, aggregation: mean, higher_is_better: false}
  - {metric: pct_stereotype, aggregation: mean, higher_is_better: false}
"""
)
BROKEN = TASK.replace("local_arc", "broken").replace("FILE", "nowhere.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    made = tmp_path_factory.mktemp("harness")
    (made / "local_arc.yaml").write_text(TASK.replace("FILE", str(made / "arc.jsonl")))
    (made / "broken.yaml").write_text(BROKEN)
    (made / "local_crows_pairs.yaml").write_text(CROWS.replace("FILE", str(made / "pairs.jsonl")))
    # Its own functions; only the file is ours.
    (made / "crows.py").write_text("from lm_eval.tasks.crows_pairs.utils import doc_to_choice, process_results\n")
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


def test_crows_pairs_are_scored_as_its_own_task_scores_them(
    folder: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    words = ["Rain", "Iron", "Oaks", "Moss", "Wind", "Snow", "Sand", "Mist"]  # the first token counts too
    pairs = [Pair(f"{one} is old.", f"{other} is old.", "age") for one, other in pairwise(words)]
    rows = [{"sent_more": pair.more, "sent_less": pair.less} for pair in pairs]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task, own = HarnessTask("local_crows_pairs", folder), CrowsPairs(pairs)
    theirs = {each.name: each.value for each in task.figures(task.ask(Probe(backbone)))}
    ours = {each.name: each.value for each in own.figures(own.ask(Probe(backbone)))}
    assert 0 < ours["score"] < 100
    assert ours["score"] == pytest.approx(100 * theirs["local_crows_pairs, pct_stereotype"])
    assert ours["difference in nats"] == pytest.approx(theirs["local_crows_pairs, likelihood_diff"], rel=1e-4)


def test_what_cannot_be_run_is_one_line(folder: Path, backbone: Backbone) -> None:
    with pytest.raises(UserError, match="has no task 'mml'; did you mean mmlu"):
        HarnessTask("mml", folder)
    assert {HarnessTask(name, folder).name for name in ("mmlu", "gpqa_main_zeroshot", "ifeval", "arc_easy", "bbq")}
    with pytest.raises(UserError) as found:
        HarnessTask("broken", folder).ask(Probe(backbone))
    assert str(found.value).startswith("harness task 'broken' cannot be run: ")
    assert "\n" not in str(found.value) and "nowhere.jsonl" in str(found.value)
