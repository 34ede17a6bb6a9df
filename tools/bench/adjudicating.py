"""Two models judge each other's answers (:mod:`dso.evaluation.adjudication`): how right is what they agree on?

``roles`` says which decisions have an answer and which one; neither model is told. So the rulings can be counted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from dso.decisions.decision import Decision, DecisionSet
from dso.decisions.sets import load_decisions
from dso.editing.patch import Patch
from dso.evaluation.adjudication import agreed, heard, rule
from dso.evaluation.report import fixed_rows
from dso.files import write_text
from dso.models.backbone import Backbone
from launch.commands.common import quieten


def adjudicate(arguments: argparse.Namespace) -> None:
    """The rulings on some decisions of ``roles``, counted, and what was agreed as a file of decisions."""
    quieten()
    decisions = questions(arguments.couples, arguments.facts)
    said = []
    for name, patch in ((arguments.first, arguments.first_patch), (arguments.second, arguments.second_patch)):
        backbone = Backbone.load(name)
        handle = Patch.from_pretrained(patch).attach(backbone.model, arguments.scale) if patch else None
        said.append(heard(backbone, decisions))
        if handle is not None:
            handle.detach()
    rulings = rule(decisions, said, support=arguments.support, near=arguments.near)
    counts = Counter((ruling.decision.kind, verdict(ruling.decision, ruling.made)) for ruling in rulings)
    rows = [{"kind": kind, "verdict": found, "decisions": count} for (kind, found), count in sorted(counts.items())]
    folder = Path(arguments.results)
    about = {key: value for key, value in vars(arguments).items() if key not in ("name", "results")}
    write_text(folder / "adjudicate.json", json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print(
        fixed_rows([("kind", "verdict", "decisions"), *(tuple(str(value) for value in row.values()) for row in rows)])
    )
    if any(ruling.made is not None for ruling in rulings):
        agreed(rulings, decisions.groups).write_jsonl(folder / "agreed.jsonl")
        print(f"written to {folder / 'agreed.jsonl'}")


def questions(couples: int, facts: int) -> DecisionSet:
    """Ambiguous decisions of the training split of ``roles`` in both orders, and unambiguous ones."""
    found = load_decisions("roles", splits=["train"], train_blocks=couples, block_contexts=2, train_unambiguous=facts)
    return found.select(lambda decision: isinstance(decision.prompt, str))


def verdict(decision: Decision, made: Decision | None) -> str:
    """What became of a decision, against what it is."""
    if made is None:
        return "none"
    if made.answer is None:
        return "fair"
    if decision.answer is None:
        return "an answer that the text does not give"
    return "the right answer" if made.answer == decision.answer else "a wrong answer"
