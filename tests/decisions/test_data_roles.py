"""The set ``roles``: counterbalancing is exact, nothing leaks between splits, the same seed gives the same set."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations

import pytest

from dso.decisions.decision import Decision, DecisionError, DecisionSet
from dso.decisions.sets import load_decisions, roles
from dso.decisions.sets.names import NAME_SPLITS, clash, groups_of, names_of
from dso.decisions.sets.templates import AMBIGUOUS, UNAMBIGUOUS, Template, article, fill

ATTRIBUTES = ("gender", "gender x race")
STYLES = {"plain", "chat", "hiring", "letter", "list", "story", "minutes", "phone", "news", "email"}
EVALUATION = ("validation", "test", "test-names", "test-templates", "test-contexts")


@pytest.fixture(scope="module", params=ATTRIBUTES)
def whole(request: pytest.FixtureRequest) -> DecisionSet:
    return roles.build(request.param)


@pytest.fixture(scope="module")
def gender() -> DecisionSet:
    return roles.build("gender")


def text(decision: Decision) -> str:
    prompt = decision.prompt
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)


def order(decision: Decision) -> tuple[str, ...]:
    """The groups in the order that the prompt mentions their people in, found by searching for the names."""
    said = text(decision)
    places = {c.group: re.search(rf"\b{c.text.strip()}\b", said).start() for c in decision.candidates}
    return tuple(sorted(places, key=places.get))


def names(decisions: Iterable[Decision]) -> set[str]:
    return {c.text.strip() for d in decisions for c in d.candidates}


def listed(attribute: str, *splits: str) -> list[str]:
    """All names of an attribute's splits, as often as the lists have them."""
    return [name for split in splits for li in names_of(attribute, split) for group in li for name in group]


def test_sizes_of_the_gender_set(gender: DecisionSet) -> None:
    counts = Counter((d.split, d.kind) for d in gender)
    assert counts == {
        ("train", "ambiguous"): 150 * 6 * 2,
        ("train", "unambiguous"): 400,
        ("validation", "ambiguous"): 38 * 30 * 2,
        ("validation", "unambiguous"): 128,
        ("test", "ambiguous"): 106 * 30 * 2,
        ("test", "unambiguous"): 320,
        ("test-names", "ambiguous"): 64 * 30 * 2,
        ("test-names", "unambiguous"): 320,
        ("test-templates", "ambiguous"): 96 * 30 * 2,
        ("test-templates", "unambiguous"): 320,
        ("test-contexts", "ambiguous"): 96 * 10 * 2,
        ("test-contexts", "unambiguous"): 320,
    }
    assert gender.groups == ("female", "male")


def test_every_group_stands_at_every_place_equally_often_in_every_context(whole: DecisionSet) -> None:
    for split in whole.splits:
        part = whole.select(split=split, kind="ambiguous")
        for context in part.contexts:
            counts = Counter(
                (place, group) for d in part if d.context == context for place, group in enumerate(order(d))
            )
            assert len(counts) == len(whole.groups) ** 2 and len(set(counts.values())) == 1, (split, context)


@pytest.mark.parametrize("split", EVALUATION)
def test_units_are_the_same_in_every_context_with_one_template_each(whole: DecisionSet, split: str) -> None:
    part = whole.select(split=split, kind="ambiguous")
    by_context = defaultdict(list)
    for d in part:
        by_context[d.context].append((d.unit, d.template, order(d)))
    first, *others = by_context.values()
    assert all(sorted(other) == sorted(first) for other in others)
    templates = defaultdict(set)
    for unit, template, _ in first:
        templates[unit].add(template)
    assert all(len(used) == 1 for used in templates.values())
    used = Counter(name for unit in templates for name in unit.split("/"))
    assert set(used.values()) == {1}, "a name is in two units"
    spread = Counter(template for used in templates.values() for template in used)
    assert max(spread.values()) - min(spread.values()) <= 1


def test_splits_share_no_names_templates_or_occupations_that_they_should_not(whole: DecisionSet) -> None:
    parts = {split: whole.select(split=split) for split in whole.splits}
    templates = {split: {d.template for d in part} for split, part in parts.items()}
    contexts = {split: set(part.contexts) for split, part in parts.items()}
    people = {split: names(part) for split, part in parts.items()}
    attribute = next(attribute for attribute in ATTRIBUTES if groups_of(attribute) == whole.groups)
    people["train"] = names(roles.build(attribute, splits=["train"], train_blocks=175))  # a whole round of names
    for one, two in combinations(("train", "validation", "test"), 2):
        assert not people[one] & people[two] and not templates[one] & templates[two]
    assert not people["train"] & people["test-names"] and templates["test-names"] <= templates["train"]
    assert people["test-templates"] <= people["train"] and templates["test-templates"] == templates["test"]
    assert not people["test-contexts"] & people["train"] and not templates["test-contexts"] & templates["train"]
    assert not contexts["test-contexts"] & set().union(*(contexts[s] for s in contexts if s != "test-contexts"))
    assert len(contexts["test-contexts"]) == 10 and len(contexts["train"]) == len(contexts["test"]) == 30
    for split in contexts:
        mentioned = {
            o for o in roles.occupations(held_out=split != "test-contexts") for d in parts[split] if _says(d, o)
        }
        assert not mentioned, f"{split} mentions {mentioned}"


def _says(decision: Decision, occupation: str) -> bool:
    return re.search(rf"\b{occupation}\b", text(decision), re.IGNORECASE) is not None


def test_the_people_that_were_added_are_in_no_other_split(gender: DecisionSet) -> None:
    people = roles.build("gender", splits=["test-people"])
    assert len({d.unit for d in people if d.ambiguous}) == 441
    assert len(names(people)) == 882
    assert not names(people) & set(listed("gender", *(split for split in NAME_SPLITS if split != "people")))
    assert {d.template for d in people} == {d.template for d in gender.select(split="test")}
    with pytest.raises(DecisionError, match="test-people has no names of gender x race; there are some of gender"):
        roles.build("gender x race", splits=["test-people"])


def test_training_blocks(whole: DecisionSet) -> None:
    groups = len(whole.groups)
    blocks = defaultdict(list)
    for d in whole.select(split="train", kind="ambiguous"):
        blocks[d.id.split("/")[1]].append(d)
    assert len(blocks) == 150
    for block in blocks.values():
        assert len({d.template for d in block}) == len({d.unit for d in block}) == 1
        contexts = Counter(d.context for d in block)
        assert len(contexts) == 6 and set(contexts.values()) == {groups}
        for context in contexts:
            orders = {order(d) for d in block if d.context == context}
            assert len(orders) == groups
    pool = whole.select(split="train", kind="ambiguous")
    assert set(Counter(d.context for d in pool).values()) == {150 * 6 * groups // 30}
    used = Counter(d.template for d in pool)
    assert max(used.values()) - min(used.values()) <= 6 * groups


def test_a_block_size_that_does_not_divide_the_contexts_repeats_none_within_a_block() -> None:
    part = roles.build(splits=["train"], train_blocks=40, block_contexts=7, train_unambiguous=0)
    counts = Counter((d.id.split("/")[1], d.context) for d in part)
    assert len(counts) == 40 * 7 and set(counts.values()) == {2}


def test_unambiguous_decisions_are_counterbalanced_in_everything_at_once(whole: DecisionSet) -> None:
    size = len(whole.groups)
    for split in whole.splits:
        part = whole.select(split=split, kind="unambiguous")
        cells = Counter()
        for d in part:
            asked = whole.groups[d.answer]
            factorial = d.id.split("/")[1]
            cells[factorial, d.context, asked, order(d).index(asked)] += 1
        # every occupation is asked for with every group at every place, once in a factorial
        assert set(cells.values()) == {1}, split
        assert len(cells) == len(part) and len(part) % size**3 == 0


def test_unambiguous_gender_answers_are_with_and_against_the_stereotype_equally_often(gender: DecisionSet) -> None:
    for split in gender.splits:
        part = gender.select(split=split, kind="unambiguous")
        with_it = sum(d.stereotype == gender.groups[d.answer] for d in part)
        assert 2 * with_it == len(part)


def test_unambiguous_prompts_state_that_the_answer_is_right(gender: DecisionSet) -> None:
    part = gender.select(split="train", kind="unambiguous")
    named = [d for d in part if d.template == "plain-fact-name"]
    for d in named:
        right = d.candidates[d.answer].text.strip()
        assert re.search(rf"\bthe {d.context} is {right}\b", text(d), re.IGNORECASE)
        assert text(d).endswith(f". The name of the {d.context} is")
    assert len(named) == 40


def test_stereotypes_are_known_for_gender_only(whole: DecisionSet) -> None:
    found = Counter({d.context: d.stereotype for d in whole}.values())
    assert found == ({None: 40} if len(whole.groups) == 4 else {"female": 20, "male": 20})


def test_candidates_begin_with_a_blank_unless_a_turn_of_the_model_begins(whole: DecisionSet) -> None:
    seen = Counter()
    for d in whole:
        opens_turn = not isinstance(d.prompt, str) and d.prompt[-1]["role"] == "user"
        assert all(c.text.startswith(" ") != opens_turn for c in d.candidates)
        assert text(d) == text(d).rstrip()
        seen[opens_turn] += 1
    assert seen[True] and seen[False]


def test_prompts_treat_the_people_alike(whole: DecisionSet) -> None:
    """With the names removed, the prompts of all orders are the same text."""
    stripped = defaultdict(set)
    for d in whole.select(kind="ambiguous"):
        said = text(d)
        for c in d.candidates:
            assert len(re.findall(rf"\b{c.text.strip()}\b", said)) == 1
            said = re.sub(rf"\b{c.text.strip()}\b", "X", said)
        said = said.replace("Dear Ms. Hill", "")  # neither of the people who are decided between
        assert not re.search(r"\b(he|she|him|her|his|man|woman|mr|ms|mrs)\b", said, re.I)
        stripped[d.template, d.context].add(said)
    assert all(len(texts) == 1 for texts in stripped.values())


def test_the_occupation_comes_after_the_people(whole: DecisionSet) -> None:
    for d in whole.select(kind="ambiguous"):
        said = text(d).lower()
        last_name = max(said.index(c.text.strip().lower()) for c in d.candidates)
        assert re.search(rf"\b{d.context}\b", said).start() > last_name, d.id


def test_only_the_training_pool_depends_on_the_seed() -> None:
    sizes = {"units": dict.fromkeys(EVALUATION, 4), "unambiguous": dict.fromkeys(EVALUATION, 16), "train_blocks": 10}
    one, again, other = (roles.build(seed=seed, **sizes) for seed in (3, 3, 4))
    assert one.decisions == again.decisions
    assert one.select(split="train").decisions != other.select(split="train").decisions
    for split in EVALUATION:
        assert one.select(split=split).decisions == other.select(split=split).decisions


def test_fewer_units_are_the_first_of_more() -> None:
    few, many = (roles.build(splits=["test"], units={"test": count}, unambiguous={"test": 0}) for count in (8, 16))
    assert few.decisions == many.decisions[: len(few)]


def test_no_name_stands_for_two_groups_or_two_splits() -> None:
    for attribute in ATTRIBUTES:
        everything = listed(attribute, *NAME_SPLITS)
        assert len(everything) == len(set(everything))
    assert len(groups_of("gender")) == 2 and len(groups_of("gender x race")) == 4


def test_the_lists_of_names_are_long_enough() -> None:
    sizes = {a: [sum(len(li[0]) for li in names_of(a, s)) for s in NAME_SPLITS] for a in ATTRIBUTES}
    assert sizes == {"gender": [103, 38, 106, 441], "gender x race": [18, 8, 26, 0]}


def test_names_of_one_unit_do_not_begin_with_one_another(whole: DecisionSet) -> None:
    assert clash(("Dan", "Danielle")) and clash(("Danielle", "Dan")) and not clash(("Ann", "Dan"))
    assert not any(clash(tuple(unit.split("/"))) for unit in {d.unit for d in whole})


def test_templates_cover_the_styles_in_every_split() -> None:
    counts = Counter(t.split for t in AMBIGUOUS)
    assert counts["train"] >= 24 and counts["validation"] >= 6 and counts["test"] >= 8 and len(AMBIGUOUS) >= 48
    assert {t.style for t in AMBIGUOUS if t.split == "train"} == STYLES
    for split in ("validation", "test"):
        assert {t.style for t in AMBIGUOUS if t.split == split} == STYLES
    counts = Counter(t.split for t in UNAMBIGUOUS)
    assert counts["train"] >= 8 and counts["validation"] >= 2 and counts["test"] >= 3
    ids = [t.id for t in (*AMBIGUOUS, *UNAMBIGUOUS)]
    texts = [t.text for t in AMBIGUOUS]
    assert len(set(ids)) == len(ids) and len(set(texts)) == len(texts)


def test_filling_by_hand() -> None:
    listed = Template("list-x", "train", "{n}:\n{bullets}\n{O} ({an_o}):")
    assert (
        fill(listed, ["Mary", "Aisha", "John"], "engineer")
        == "three:\n- Mary\n- Aisha\n- John\nEngineer (an engineer):"
    )
    told = Template("plain-x", "train", (("user", "{facts}. Who?"),), "the {o} is {x}")
    facts = [("Mary", "nurse"), ("Al", "pilot"), ("Jo", "editor")]
    assert fill(told, ["Mary", "Al", "Jo"], "pilot", facts) == (
        {"role": "user", "content": "The nurse is Mary, the pilot is Al and the editor is Jo. Who?"},
    )
    assert article("hairdresser") == "a hairdresser" and article("accountant") == "an accountant"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attribute": "age"}, "unknown attribute 'age'; known are gender, gender x race"),
        ({"splits": ["tests"]}, "splits: unknown split 'tests'; known are train, validation, test,"),
        ({"splits": "test"}, "splits: expected a list"),
        ({"units": {"train": 3}}, "units: unknown split 'train'"),
        ({"units": {"test": 107}}, r"units\['test'\] is 107, but there are names for only 106"),
        ({"units": {"test": 0}}, r"units\['test'\] is 0, expected at least 1"),
        ({"unambiguous": {"test": -1}}, r"unambiguous\['test'\] is -1, expected at least 0"),
        ({"block_contexts": 31}, "1 <= block_contexts <= 30"),
        ({"train_blocks": 0}, "train_blocks >= 1"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict, reason: str) -> None:
    with pytest.raises(DecisionError, match=reason):
        roles.build(**options)


def test_names_of_a_pair_are_equally_long_in_the_embedded_vocabulary(gender: DecisionSet) -> None:
    embedded = pytest.importorskip("dso.models.embedded")
    pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    try:
        folder = embedded.embedded_folder("smollm2-135m")
    except embedded.ModelNotFound as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lists = [group for split in NAME_SPLITS for each in names_of("gender", split) for group in each]
    lengths = {n: len(tokenizer(" " + n, add_special_tokens=False).input_ids) for names in lists for n in names}
    assert Counter(lengths.values()) == {1: 2 * 140, 2: 2 * (91 + 316), 3: 2 * (16 + 125)}
    for d in (*gender, *roles.build("gender", splits=["test-people"])):
        assert len({lengths[c.text.strip()] for c in d.candidates}) == 1, d.id


@pytest.mark.parametrize(
    ("name", "options", "digest"),
    [
        ("roles", {}, "08ebdb964ab21420"),
        ("roles", {"seed": 1, "texts": "questions"}, "c45b7fe7bc619694"),
        ("roles", {"attribute": "gender x race"}, "48b57af7ffb1be7e"),
        ("roles", {"attribute": "gender x race", "texts": "questions"}, "385b3bfae2c89f82"),
        ("pronouns", {}, "f083557b293f056d"),
    ],
)
def test_the_decisions_that_figures_were_measured_on_stay_as_they_are(name: str, options: dict, digest: str) -> None:
    found = hashlib.sha256()
    for decision in load_decisions(name, **options):
        found.update((json.dumps(decision.to_json()) + "\n").encode())
    assert found.hexdigest()[:16] == digest
