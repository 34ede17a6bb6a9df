"""The built-in set ``roles``: which of several people is the nurse, the engineer, ...?

A *unit* is one first name from each group. In an evaluation split every unit is seen in every context (occupation),
with one template, the ``i mod T``-th for unit ``i``, and with the people in all cyclic orders. So every group stands at
every place equally often in every context, name and template effects are the same in all contexts, and the prompts of a
unit share the prefix up to the occupation.

==================  =====================  ==========  =================
split               names                  templates   occupations
==================  =====================  ==========  =================
``train``           training               training    seen (30)
``validation``      validation             validation  seen
``test``            test                   test        seen
``test-names``      test                   training    seen
``test-templates``  training               test        seen
``test-contexts``   test                   test        held out (10)
``test-people``     441 more couples       test        seen
==================  =====================  ==========  =================

``train`` is a pool of blocks: one template, one unit, all orders, a few contexts; the ids of block 17 begin with
``train/b017/``. Templates, names and occupations are dealt from shuffled decks, so each is used equally often, as
nearly as the counts allow. The exception are the commonest names, those of the first list, which are dealt three times
as often because a model's associations with them are the strongest.

Unambiguous decisions state everybody's occupation and ask for one of them. The order of the people, the person asked
for and the assignment of the occupations are counterbalanced: G consecutive units share the occupations and complete
the factorial.

Only ``train`` depends on the seed; the evaluation splits are the same for every seed, so that runs are compared on the
same decisions. Occupations are in ``data/occupations.csv``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
from dso.decisions.sets.names import ATTRIBUTES, clash, groups_of, names_of
from dso.decisions.sets.questions import FACTS, QUESTIONS
from dso.decisions.sets.shipped import read_table
from dso.decisions.sets.templates import AMBIGUOUS, UNAMBIGUOUS, Template, fill

# Stereotyped by who holds the job (United States Bureau of Labor Statistics).
_OCCUPATIONS = read_table("occupations.csv")
STEREOTYPES = {row["occupation"]: row["stereotype"] for row in _OCCUPATIONS}

# split -> (whose names, whose templates, whether the occupations are the seen ones)
_EVALUATION = {
    "validation": ("validation", "validation", True),
    "test": ("test", "test", True),
    "test-names": ("test", "train", True),
    "test-templates": ("train", "test", True),
    "test-contexts": ("test", "test", False),
    "test-people": ("people", "test", True),
}
SPLITS = ("train", *_EVALUATION)
USUAL = tuple(split for split in SPLITS if split != "test-people")  # that one is as large as all others together
TEXTS = {
    "prompts": (*AMBIGUOUS, *UNAMBIGUOUS),
    "continuations": tuple(t for t in (*AMBIGUOUS, *UNAMBIGUOUS) if isinstance(t.text, str)),
    "questions": (*QUESTIONS, *FACTS),
}
_UNITS = {
    "validation": 38, "test": 106, "test-names": 64, "test-templates": 96, "test-contexts": 96, "test-people": 441
}  # fmt: skip
_UNAMBIGUOUS = {split: 128 if split == "validation" else 320 for split in _UNITS}

Unit = tuple[str, ...]


def occupations(held_out: bool = False) -> tuple[str, ...]:
    """The occupations of training, or the held-out ones; female- and male-stereotyped ones in turn."""
    part = [row["occupation"] for row in _OCCUPATIONS if row["held_out"] == ("yes" if held_out else "no")]
    female, male = ([o for o in part if STEREOTYPES[o] == group] for group in ("female", "male"))
    return tuple(o for pair in zip(female, male, strict=True) for o in pair)


def build(
    attribute: str = "gender",
    *,
    texts: str = "prompts",
    splits: Sequence[str] = USUAL,
    units: Mapping[str, int] | None = None,
    unambiguous: Mapping[str, int] | None = None,
    train_blocks: int = 150,
    block_contexts: int = 6,
    train_unambiguous: int = 400,
    seed: int = 0,
) -> DecisionSet:
    """Build the set.

    Args:
        attribute: ``gender`` (female, male) or ``gender x race`` (black female, black male, white female,
            white male).
        texts: ``prompts``, whose next word is a name; ``continuations``, those of them that are no chats, for models
            without a chat template; or ``questions``, which are answered freely (:mod:`dso.decisions.sets.questions`):
            the candidates are then what to look for in the answer.
        splits: the splits to build; ``test-people`` only where it is named.
        units: evaluation split -> number of units; the default is 38 for ``validation``, 106 for ``test``, 64 for
            ``test-names``, 441 for ``test-people`` and 96 for the others, or as many as there are names.
        unambiguous: evaluation split -> number of unambiguous decisions; the default is 128 for ``validation`` and 320
            for the others. Rounded down to whole factorials (8 for two groups, 64 for four).
        train_blocks: number of blocks in ``train``; each has ``block_contexts`` x (number of groups) decisions.
        block_contexts: contexts in a block.
        train_unambiguous: number of unambiguous decisions in ``train``, rounded down to whole factorials.
        seed: draws the training pool.

    Raises:
        DecisionError: on an unknown attribute, text or split, or a number that cannot be reached.
    """
    if attribute not in ATTRIBUTES:
        raise DecisionError(f"roles: unknown attribute {attribute!r}; known are {', '.join(ATTRIBUTES)}")
    if texts not in TEXTS:
        raise DecisionError(f"roles: unknown texts {texts!r}; known are {', '.join(TEXTS)}")
    _check_splits(splits, units or {}, unambiguous or {})
    if train_blocks < 1 or not 1 <= block_contexts <= len(occupations()) or train_unambiguous < 0:
        raise DecisionError(
            f"roles: expected train_blocks >= 1, 1 <= block_contexts <= {len(occupations())} and "
            f"train_unambiguous >= 0, found {train_blocks}, {block_contexts} and {train_unambiguous}"
        )
    maker = _Maker(attribute, texts)
    decisions: list[Decision] = []
    for split in splits:
        if split == "train":
            rng = random.Random(seed)
            decisions += maker.train_blocks(rng, train_blocks, block_contexts)
            decisions += maker.train_unambiguous(rng, train_unambiguous)
        else:
            decisions += maker.evaluation(
                split, (units or {}).get(split), {**_UNAMBIGUOUS, **(unambiguous or {})}[split]
            )
    return DecisionSet(tuple(decisions), maker.groups, f"roles ({attribute})")


def _check_splits(splits: Sequence[str], units: Mapping[str, int], unambiguous: Mapping[str, int]) -> None:
    if isinstance(splits, str) or not splits:
        raise DecisionError(f"roles: splits: expected a list of one or more of {', '.join(SPLITS)}, found {splits!r}")
    for name, given, known in (
        ("splits", splits, SPLITS),
        ("units", units, _UNITS),
        ("unambiguous", unambiguous, _UNITS),
    ):
        if wrong := [split for split in given if split not in known]:
            raise DecisionError(f"roles: {name}: unknown split {wrong[0]!r}; known are {', '.join(known)}")
    for name, counts, least in (("units", units, 1), ("unambiguous", unambiguous, 0)):
        for split, count in counts.items():
            if count < least:
                raise DecisionError(f"roles: {name}[{split!r}] is {count}, expected at least {least}")


class _Maker:
    """The names, templates and occupations of one attribute, and the decisions made of them."""

    def __init__(self, attribute: str, texts: str) -> None:
        self.attribute = attribute
        self.groups = groups_of(attribute)
        two = len(self.groups) == 2
        self.templates = [t for t in TEXTS[texts] if two or not t.pair]
        self.stereotypes = STEREOTYPES if attribute == "gender" else {}  # known for gender alone

    def choose(self, split: str, ambiguous: bool) -> list[Template]:
        return [t for t in self.templates if t.split == split and bool(t.fact) != ambiguous]

    def units(self, split: str) -> list[Unit]:
        """The units of a split: each name once, the lists evenly mixed."""
        ranked = []
        for by_group in names_of(self.attribute, split):
            units = list(zip(*by_group, strict=True))
            ranked += [((place + 0.5) / len(units), unit) for place, unit in enumerate(units)]
        return [unit for _, unit in sorted(ranked, key=lambda item: item[0])]

    def decision(
        self, ident: str, split: str, template: Template, unit: Unit, shift: int, told: Sequence[str], asked: int | None
    ) -> Decision:
        """One decision. ``told``: occupations by group; ``asked``: the right group; one and None if it is ambiguous."""
        order = [(place + shift) % len(unit) for place in range(len(unit))]
        context = told[asked or 0]
        facts = [(unit[g], told[g]) for g in order] if asked is not None else []
        prompt = fill(template, [unit[g] for g in order], context, facts)
        lead = "" if not isinstance(prompt, str) and prompt[-1]["role"] != "assistant" else " "
        return Decision(
            id=ident,
            context=context,
            kind="ambiguous" if asked is None else "unambiguous",
            prompt=prompt,
            candidates=tuple(Candidate(text=lead + name, group=g) for name, g in zip(unit, self.groups, strict=True)),
            answer=asked,
            template=template.id,
            split=split,
            unit="/".join(unit),
            stereotype=self.stereotypes.get(context),
        )

    def block(
        self, prefix: str, split: str, template: Template, unit: Unit, contexts: Sequence[str]
    ) -> Iterator[Decision]:
        """All orders of one unit in some contexts, order by order: the prompts of an order share a prefix."""
        for shift in range(len(self.groups)):
            for context in contexts:
                ident = f"{prefix}/{context.replace(' ', '-')}/{shift}"
                yield self.decision(ident, split, template, unit, shift, [context], None)

    def factorial(
        self, prefix: str, split: str, templates: Sequence[Template], units: Sequence[Unit], told: Sequence[str]
    ) -> Iterator[Decision]:
        """G units with their templates, in every combination of order, person asked for and assignment, once each."""
        size = len(self.groups)
        for offset, (unit, template) in enumerate(zip(units, templates, strict=True)):
            for shift in range(size):
                for asked in range(size):
                    turned = [told[(g + shift + offset) % size] for g in range(size)]
                    yield self.decision(
                        f"{prefix}/{offset}/{shift}/{asked}", split, template, unit, shift, turned, asked
                    )

    def evaluation(self, split: str, count: int | None, unambiguous: int) -> Iterator[Decision]:
        names, templates, seen = _EVALUATION[split]
        units = self.units(names)
        if not units:
            raise DecisionError(f"roles: {split} has no names of {self.attribute}; there are some of gender")
        if count is not None and count > len(units):
            raise DecisionError(f"roles: units[{split!r}] is {count}, but there are names for only {len(units)}")
        chosen = self.choose(templates, True)
        for index, unit in enumerate(units[: count or _UNITS[split]]):
            template = chosen[index % len(chosen)]
            yield from self.block(f"{split}/{index:03d}", split, template, unit, occupations(held_out=not seen))
        chosen, size = self.choose(templates, False), len(self.groups)
        pool = occupations(held_out=not seen)
        for index in range(unambiguous // size**3):
            # The pool alternates between the stereotypes, and an odd step keeps that.
            told = [pool[(index * size + g * 3) % len(pool)] for g in range(size)]
            pick = [units[(index * size + offset) % len(units)] for offset in range(size)]
            used = [chosen[(index + offset) % len(chosen)] for offset in range(size)]
            yield from self.factorial(f"{split}/u{index:03d}", split, used, pick, told)

    def train_blocks(self, rng: random.Random, count: int, contexts: int) -> Iterator[Decision]:
        units, templates, pool = self.deal_units(rng), _deal(rng, self.choose("train", True)), _deal(rng, occupations())
        for index in range(count):
            picked = _different(pool, contexts)
            yield from self.block(f"train/b{index:03d}", "train", next(templates), next(units), picked)

    def train_unambiguous(self, rng: random.Random, count: int) -> Iterator[Decision]:
        size = len(self.groups)
        units, templates, pool = self.deal_units(rng), _deal(rng, self.choose("train", False)), occupations()
        # Half female- and half male-stereotyped, so that the assignment is with and against the stereotype.
        halves = [_deal(rng, pool[start::2]) for start in (0, 1)]
        for index in range(count // size**3):
            told = [o for half in halves for o in _different(half, size // 2)]
            picked, used = list(islice(units, size)), list(islice(templates, size))
            yield from self.factorial(f"train/u{index:03d}", "train", used, picked, told)

    def deal_units(self, rng: random.Random) -> Iterator[Unit]:
        """Endless units, in rounds: all training names in new combinations, those of the first list in three."""
        first, *others = names_of(self.attribute, "train")
        while True:
            units: list[Unit] = []
            for by_group in (first, first, first, *others):
                units += _combine(rng, by_group)
            rng.shuffle(units)
            yield from units


def _combine(rng: random.Random, by_group: Sequence[Sequence[str]]) -> list[Unit]:
    while True:
        units = list(zip(*(rng.sample(names, len(names)) for names in by_group), strict=True))
        if not any(clash(unit) for unit in units):
            return units


def _deal(rng: random.Random, items: Sequence) -> Iterator:
    """Endless items: all of them in random order, then all again in another."""
    while True:
        yield from rng.sample(items, len(items))


def _different(deck: Iterator[str], count: int) -> list[str]:
    """The next ``count`` different items; one that comes again at the seam of two rounds is dropped."""
    picked: list[str] = []
    while len(picked) < count:
        if (item := next(deck)) not in picked:
            picked.append(item)
    return picked
