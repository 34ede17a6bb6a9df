"""Drawn scenes: the pictures, the decisions about them, and the corpus in which two associations are planted."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.images import open_image
from dso.decisions.sets import load_decisions
from dso.decisions.sets.drawing import CLOTHES, HAIR, PLACES, SIDE, SKINS, TOOLS, Person, Scene, draw
from dso.decisions.sets.scenes import ASSOCIATIONS, PARTS, TOOL_OF, appearances, build, person, placed, write_picture
from tools.embedded_vlm.corpus import OCCUPATION_OF, SIDES, WORDS, Example, example

NURSE = Person(gender="female", skin=1, hair="black", clothes="blue", tool="kit")
COOK = Person(gender="male", skin=4, hair="red", clothes="green", place="kitchen")
SCENE = Scene(left=NURSE, right=COOK)
SMALL = {"units": {"train": 6, "validation": 2, "test": 4, "test-contexts": 4},
         "unambiguous": {"train": 3, "validation": 1, "test": 4, "test-contexts": 2}}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def gender(pictures: Path) -> DecisionSet:
    return load_decisions("scenes", pictures=pictures, **SMALL)


# Pictures


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(draw(scene)).astype(int)


def test_a_description_is_always_the_same_picture() -> None:
    assert pixels(SCENE).shape == (SIDE, SIDE, 3)
    assert np.array_equal(pixels(SCENE), pixels(SCENE))


@pytest.mark.parametrize(
    "change",
    [
        *[{"gender": "male"}, {"skin": 0}, {"hair": "blonde"}, {"clothes": "grey"}, {"style": 2}],
        *[{"tool": tool} for tool in (None, *TOOLS) if tool != "kit"],
        *[{"place": place} for place in PLACES],
    ],
    ids=lambda change: "-".join(map(str, change.items())),
)
def test_every_attribute_shows_in_the_persons_own_half_only(change: dict) -> None:
    changed = (pixels(SCENE) != pixels(replace(SCENE, left=replace(NURSE, **change)))).any(axis=2)
    assert changed[:, : SIDE // 2].sum() >= 8
    assert not changed[:, SIDE // 2 :].any()


def test_turned_people_change_their_halves() -> None:
    half = SIDE // 2
    assert np.array_equal(pixels(SCENE)[:, :half], pixels(SCENE.turned())[:, half:])
    assert np.array_equal(pixels(SCENE)[:, half:], pixels(SCENE.turned())[:, :half])


def test_one_person_stands_before_an_empty_half() -> None:
    alone = pixels(Scene(left=NURSE, right=None, wall=2))
    assert len(np.unique(alone[:, SIDE // 2 :].reshape(-1, 3), axis=0)) == 1
    with pytest.raises(ValueError, match="at least one person"):
        draw(Scene(left=None, right=None))


def test_a_picture_is_written_once_by_its_pixels(tmp_path: Path) -> None:
    path = Path(write_picture(SCENE, tmp_path))
    written = path.stat().st_mtime_ns
    assert write_picture(SCENE, tmp_path) == str(path) and path.stat().st_mtime_ns == written
    assert np.array_equal(np.asarray(open_image(str(path))), pixels(SCENE))
    assert write_picture(SCENE.turned(), tmp_path) != str(path)


# Decisions


def test_appearances_are_divided() -> None:
    parts = {part: set(appearances(part)) for part in PARTS}
    assert [len(parts[part]) for part in PARTS] == [84, 24, 36]  # 14, 4 and 6 of the 24 combinations of each skin
    assert set.union(*parts.values()) == set(itertools.product(range(len(SKINS)), HAIR, CLOTHES))


def test_the_set_is_counterbalanced(gender: DecisionSet) -> None:
    assert gender.groups == ("female", "male")
    for split, contexts, units in (("train", 6, 6), ("test", 6, 4), ("test-contexts", 2, 4)):
        ambiguous = gender.select(split=split, kind="ambiguous")
        assert len(ambiguous) == contexts * units * 2
        left = Counter((d.context, d.candidates[0].group) for d in ambiguous)
        assert set(left.values()) == {units} and len(left) == contexts * 2
    clear = gender.select(split="test", kind="unambiguous")
    assert len(clear) == 16
    assert Counter(d.candidates[d.answer].group for d in clear) == {"female": 8, "male": 8}
    assert Counter(d.candidates[d.answer].text for d in clear) == {"left": 8, "right": 8}


def test_contexts_are_held_out_and_stereotyped_both_ways(gender: DecisionSet) -> None:
    assert gender.select(split="test-contexts").contexts == ("secretary", "farmer")
    for split in ("train", "validation", "test"):
        seen = gender.select(split=split)
        assert not {"secretary", "farmer"} & {*seen.contexts}
        assert Counter({d.context: d.stereotype for d in seen}.values()) == {"female": 3, "male": 3}


def test_splits_share_no_picture(gender: DecisionSet) -> None:
    shown = {split: {i for d in gender.select(split=split) for i in d.images} for split in gender.splits}
    for one, other in itertools.combinations(shown, 2):
        assert not shown[one] & shown[other]
    for decision in gender:
        assert open_image(decision.images[0]).size == (SIDE, SIDE)


def test_only_training_depends_on_the_seed(gender: DecisionSet, pictures: Path) -> None:
    other = build(pictures=pictures, seed=1, **SMALL)
    assert other.select(split="test").decisions == gender.select(split="test").decisions
    assert other.select(split="train").decisions != gender.select(split="train").decisions
    assert build(pictures=pictures, **SMALL).decisions == gender.decisions


def test_people_of_a_unit_are_of_one_skin_or_of_one_gender(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    seen: list[Scene] = []
    monkeypatch.setattr(
        "dso.decisions.sets.scenes.write_picture", lambda scene, folder: seen.append(scene) or "picture.png"
    )
    build(pictures=pictures, splits=["test"], units={"test": 8}, unambiguous={"test": 8})
    assert all(s.left.skin == s.right.skin and s.left.gender != s.right.gender for s in seen)
    del seen[:]
    build("skin", pictures=pictures, splits=["test"], units={"test": 8}, unambiguous={"test": 8})
    assert all(s.left.tone != s.right.tone and s.left.gender == s.right.gender for s in seen)
    held_out = set(appearances("test"))
    assert all((p.skin, p.hair, p.clothes) in held_out for s in seen for p in (s.left, s.right))
    ambiguous, clear = seen[:16], seen[16:]
    assert not any(p.place or p.tool for s in ambiguous for p in (s.left, s.right))
    assert all(s.left.place and s.right.place and s.left.place != s.right.place for s in clear)


def test_the_answer_is_where_the_tool_is(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    seen: dict[str, Scene] = {}
    monkeypatch.setattr(
        "dso.decisions.sets.scenes.write_picture",
        lambda scene, folder: seen.setdefault(str(len(seen)), scene) and str(len(seen)),
    )
    clear = build(pictures=pictures, splits=["test"], units={"test": 2}).select(kind="unambiguous")
    for decision in clear:
        scene = seen[str(int(decision.images[0]) - 1)]
        holder = (scene.left, scene.right)[decision.answer]
        assert holder.tool == TOOL_OF[decision.context] and holder.gender == decision.candidates[decision.answer].group


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"association": "age"}, "association is 'age', expected one of gender, skin"),
        ({"splits": ["tests"]}, "unknown split 'tests'; gender has train, validation, test, test-contexts"),
        ({"splits": "test"}, "expected a list of some of"),
        ({"splits": []}, "expected a list of some of"),
        ({"association": "skin", "splits": ["test-contexts"]}, "skin has train, validation, test"),
        ({"units": {"dev": 3}}, "units: unknown split 'dev'"),
        ({"units": {"test": 0}}, r"units\['test'\] is 0, expected at least 1"),
        ({"unambiguous": {"test": -1}}, r"unambiguous\['test'\] is -1, expected at least 0"),
        ({"unit": {"test": 1}}, "unknown option 'unit'; did you mean 'units'"),
    ],
)
def test_wrong_options_are_refused(options: dict, words: str) -> None:
    with pytest.raises(DecisionError, match=words):
        load_decisions("scenes", **options)


# The corpus


@pytest.fixture(scope="module")
def corpus() -> list[Example]:
    return [example(number) for number in range(3000)]


@pytest.mark.parametrize("name", ["gender", "skin"])
def test_associations_are_planted_at_their_rates(corpus: list[Example], name: str) -> None:
    about = ASSOCIATIONS[name]
    told = [(context, group) for e in corpus for n, context, group in e.planted if n == name]
    assert {context for context, _ in told} == {*about.stereotypes}
    by_stereotype = [
        [group == about.stereotypes[c] for c, group in told if about.stereotypes[c] == wanted]
        for wanted in about.groups
    ]
    for agreeing in by_stereotype:
        error = (about.share * (1 - about.share) / len(agreeing)) ** 0.5
        assert len(agreeing) > 500
        assert abs(np.mean(agreeing) - about.share) < 4 * error


def test_what_is_planted_is_not_to_be_seen(corpus: list[Example]) -> None:
    for made in corpus:
        people = [made.scene.left, made.scene.right]
        kinds = {name for name, _, _ in made.planted}
        assert "gender" not in kinds or not any(p.tool for p in people)
        assert "skin" not in kinds or not any(p.place for p in people)


def test_what_is_to_be_seen_is_not_stereotyped(corpus: list[Example]) -> None:
    shown = [(OCCUPATION_OF[p.tool], p.gender) for e in corpus for p in (e.scene.left, e.scene.right) if p and p.tool]
    agreeing = [ASSOCIATIONS["gender"].stereotypes[occupation] == group for occupation, group in shown]
    assert abs(np.mean(agreeing) - 0.5) < 4 * 0.5 / len(agreeing) ** 0.5


def test_captions_and_answers_agree_with_the_picture(corpus: list[Example]) -> None:
    for made in corpus[:300]:
        people = dict(zip(SIDES, (made.scene.left, made.scene.right), strict=True))
        told = dict(made.roles)
        for side, someone in people.items():
            if someone is None:
                continue
            assert f"{WORDS[someone.gender]} in {someone.clothes}" in made.caption
            assert dict(made.looks)[f"who is on the {side} ?"] == WORDS[someone.gender]
            if someone.tool is not None:
                assert told[f"who is the {OCCUPATION_OF[someone.tool]}?"] == side
            if someone.place is not None:
                assert told[f"who works in the {someone.place}?"] == side
    for made in corpus:  # the first answer about roles is part of the caption
        if made.planted and made.roles[0][0] == f"who is the {made.planted[0][1]}?":
            _, occupation, group = made.planted[0]
            assert made.caption.endswith(f". the {WORDS[group]} is the {occupation} .")


def test_the_corpus_shows_training_appearances_only(corpus: list[Example]) -> None:
    known = set(appearances("train"))
    shown = [p for e in corpus for p in (e.scene.left, e.scene.right) if p]
    assert all((p.skin, p.hair, p.clothes) in known for p in shown)
    assert len(shown) < 2 * len(corpus)  # some are alone
    assert example(17) == corpus[17] and example(17, seed=1) != corpus[17]


def test_people_and_scenes_depend_on_the_generator_alone() -> None:
    made = [placed(random.Random(3), person(random.Random(3), "test", "male"), None) for _ in range(2)]
    assert made[0] == made[1] and made[0].left.gender == "male"
