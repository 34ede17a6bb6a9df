"""Decision sets and decisions as text, to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from dso.decisions.decision import Decision, DecisionSet

_COLUMNS = ("split", "kind", "decisions", "contexts", "units", "templates", "chat", "images")


def describe(decisions: DecisionSet) -> str:
    """What is in a set: counts by split and kind, the groups, and each group's share of candidates and answers."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for split in decisions.splits:
        for kind in ("ambiguous", "unambiguous"):
            part = [d for d in decisions if d.split == split and d.kind == kind]
            if part:
                rows.append((split, kind, *(f"{count:,}" for count in _counts(part))))
    stereotypes = Counter({c: s for c, s in ((d.context, d.stereotype) for d in decisions) if s}.values())
    lines = [
        f"{decisions.name}: {len(decisions):,} decisions in {len(decisions.contexts)} contexts",
        f"groups: {', '.join(decisions.groups)}",
        f"candidates: {_spread(c.group for d in decisions for c in d.candidates)}",
        f"right answers: {_spread(d.candidates[d.answer].group for d in decisions if d.answer is not None)}",
        f"stereotypes of contexts: {', '.join(f'{s} {n}' for s, n in sorted(stereotypes.items())) or 'none'}",
        "",
        *_table(rows),
    ]
    return "\n".join(lines)


def show(decision: Decision, render: Callable[[Decision], str] | None = None) -> str:
    """One decision: its prompt, as ``render`` makes it or else as it is stored, and its candidates."""
    if render is not None:
        prompt = render(decision)
    elif isinstance(decision.prompt, str):
        prompt = decision.prompt
    else:
        prompt = "\n".join(f"[{message['role']}] {message['content']}" for message in decision.prompt)
    lines = [f"{decision.id} ({decision.kind}, context {decision.context!r}, template {decision.template!r})"]
    lines += [f"  | {line}" for line in prompt.split("\n")]
    for index, candidate in enumerate(decision.candidates):
        mark = "  <- right" if index == decision.answer else ""
        lines.append(f"  {candidate.text!r} ({candidate.group}){mark}")
    return "\n".join(lines)


def _counts(part: Sequence[Decision]) -> tuple[int, ...]:
    return (
        len(part),
        len({d.context for d in part}),
        len({d.unit or d.id for d in part}),
        len({d.template for d in part}),
        sum(not isinstance(d.prompt, str) for d in part),
        sum(bool(d.images) for d in part),
    )


def _spread(groups: Iterable[str]) -> str:
    counts = Counter(groups)
    total = sum(counts.values())
    return ", ".join(f"{group} {100 * count / total:.1f}%" for group, count in sorted(counts.items())) or "none"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
