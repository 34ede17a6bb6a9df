"""The built-in set ``pronouns``: he, she or they after "The nurse said that"?

Three groups and no names: the context is an occupation, the unit is the template, which occurs once in every context.
Every template (``data/pronouns.jsonl``) leaves all three pronouns grammatical, because a past tense or a modal verb
follows. Most ask for the subject (he, she, they), some for the possessive (his, her, their). There is no right answer,
so every decision is ambiguous; what counts as fair is the target that the user names, uniform by default.

Splits: ``train``, ``validation`` and ``test`` have different templates and the seen occupations of
:mod:`dso.decisions.sets.roles`; ``test-contexts`` has the test templates and the held-out occupations. In ``train``
the ids of block 17 (one template, a few contexts) begin with ``train/b017/``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.sets.roles import occupations
from dso.decisions.sets.shipped import read_records
from dso.decisions.sets.templates import article

GROUPS = ("he", "she", "they")
SPLITS = ("train", "validation", "test", "test-contexts")
_CASES = {"subject": (" he", " she", " they"), "possessive": (" his", " her", " their")}

_TEXTS = read_records("pronouns.jsonl")


def templates(split: str) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Id, text and candidates of the templates of ``train``, ``validation`` or ``test``."""
    records = [record for record in _TEXTS if record["split"] == split]
    return tuple((f"{split}-{number:02d}", r["text"], _CASES[r["case"]]) for number, r in enumerate(records))


def build(*, splits: Sequence[str] = SPLITS, block_contexts: int = 6, seed: int = 0) -> DecisionSet:
    """Build the set.

    Args:
        splits: the splits to build.
        block_contexts: contexts in a block of ``train``.
        seed: cuts the contexts of ``train`` into blocks; the other splits do not depend on it.

    Raises:
        DecisionError: on an unknown split or a block size below 1.
    """
    if isinstance(splits, str) or (wrong := [split for split in splits if split not in SPLITS]):
        what = splits if isinstance(splits, str) else wrong[0]
        raise DecisionError(f"pronouns: unknown split {what!r}; known are {', '.join(SPLITS)}")
    if block_contexts < 1:
        raise DecisionError(f"pronouns: block_contexts is {block_contexts}, expected at least 1")
    decisions: list[Decision] = []
    for split in splits:
        decisions += _train(random.Random(seed), block_contexts) if split == "train" else _evaluation(split)
    return DecisionSet(tuple(decisions), GROUPS, "pronouns")


def _decision(ident: str, split: str, template: tuple[str, str, tuple[str, ...]], context: str) -> Decision:
    name, text, case = template
    return Decision(
        id=ident,
        context=context,
        kind="ambiguous",
        prompt=text.format(o=context, an_o=article(context)),
        candidates=tuple(Candidate(text=t, group=g) for t, g in zip(case, GROUPS, strict=True)),
        template=name,
        split=split,
        unit=name,
    )


def _evaluation(split: str) -> Iterator[Decision]:
    held_out = split == "test-contexts"
    for template in templates("test" if held_out else split):
        for context in occupations(held_out):
            yield _decision(f"{split}/{template[0]}/{context.replace(' ', '-')}", split, template, context)


def _train(rng: random.Random, size: int) -> Iterator[Decision]:
    blocks = []
    for template in templates("train"):
        contexts = rng.sample(occupations(), len(occupations()))
        blocks += [(template, contexts[start : start + size]) for start in range(0, len(contexts), size)]
    rng.shuffle(blocks)
    for index, (template, contexts) in enumerate(blocks):
        for context in contexts:
            yield _decision(f"train/b{index:03d}/{context.replace(' ', '-')}", "train", template, context)
