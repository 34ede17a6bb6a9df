"""The schema of decisions: what is read, and what is refused with file, line and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionError, DecisionSet, check_target
from dso.decisions.jsonl import decision_from_json, read_jsonl

GOOD = {
    "id": "d1",
    "context": "nurse",
    "kind": "ambiguous",
    "prompt": "Mary and John are here. The nurse is",
    "candidates": [{"text": " Mary", "group": "female"}, {"text": " John", "group": "male"}],
    "answer": None,
    "template": "t01",
    "split": "train",
}
CHAT = [{"role": "user", "content": "Who is the nurse, Mary or John?"}, {"role": "assistant", "content": "It is"}]


def write(path: Path, *records: dict | bytes) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def candidates(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"text": text, "group": group} for text, group in pairs]


def test_a_written_set_reads_back_equal(tmp_path: Path) -> None:
    full = GOOD | {"id": "d2", "kind": "unambiguous", "answer": 1, "unit": "Mary/John", "stereotype": "female"}
    chat = [CHAT[0] | {"content": "<image>" + CHAT[0]["content"]}, *CHAT[1:]]
    full |= {"images": ["faces/a.png"], "prompt": chat, "split": "test"}
    decisions = read_jsonl(write(tmp_path / "set.jsonl", GOOD, full))
    assert len(decisions) == 2 and decisions.groups == ("female", "male") and decisions.name == "set"
    assert decisions[1].prompt == tuple(chat) and not decisions[1].ambiguous
    assert decisions[1].images == (str(tmp_path / "faces" / "a.png"),)
    decisions.write_jsonl(tmp_path / "again.jsonl")
    again = read_jsonl(tmp_path / "again.jsonl")
    assert again.decisions == decisions.decisions
    assert json.loads((tmp_path / "again.jsonl").read_text().splitlines()[1]) == full
    (tmp_path / "other").mkdir()
    decisions.write_jsonl(tmp_path / "other" / "set.jsonl")
    assert read_jsonl(tmp_path / "other" / "set.jsonl").decisions == decisions.decisions


def test_blank_lines_count_as_lines_but_hold_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", GOOD, b"", b"  ", GOOD)
    with pytest.raises(DecisionError, match=r"set\.jsonl:4: duplicate id 'd1', first used on line 1"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"candidates": candidates((" Mary", "female"))}, "1 candidate.*at least 2"),
        ({"candidates": []}, "0 candidate.*at least 2"),
        (
            {"candidates": candidates((" Mary", "female"), (" Mary", "male"))},
            "two candidates have the same text ' Mary'",
        ),
        (
            {"candidates": candidates((" Mary", "robot"), (" John", "male"))},
            "unknown group 'robot'; known are.*female, male",
        ),
        ({"candidates": candidates((" Mary", ""), (" John", "male"))}, "candidate ' Mary' has no group"),
        ({"candidates": candidates((" ", "female"), (" John", "male"))}, "a candidate's text is empty"),
        ({"candidates": candidates((" x", ABSTAIN), (" y", ABSTAIN))}, "every candidate is 'abstain'"),
        ({"candidates": [" Mary", " John"]}, "a candidate must be .*found ' Mary'"),
        ({"candidates": "Mary"}, "candidates must be a list, found str"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": [{"role": "user", "content": ""}]}, "the prompt is empty"),
        ({"prompt": []}, "prompt must be a string or a list"),
        ({"prompt": [{"role": "user"}]}, "prompt must be a string or a list"),
        ({"prompt": [{"role": "human", "content": "Who?"}]}, "unknown role 'human'.*system, user, assistant"),
        ({"kind": "unclear"}, "kind is 'unclear', expected one of ambiguous, unambiguous"),
        ({"kind": "unambiguous"}, r"answer is None, expected the index of a candidate \(0 to 1\)"),
        ({"kind": "unambiguous", "answer": 2}, "answer is 2, expected the index"),
        ({"kind": "unambiguous", "answer": -1}, "answer is -1, expected the index"),
        ({"kind": "unambiguous", "answer": True}, "answer is True, expected the index"),
        ({"answer": 0}, "answer is 0, but an ambiguous decision has none"),
        ({"id": ""}, "the id is empty"),
        ({"id": 7}, "id must be a string, found 7"),
        ({"context": ""}, "the context is empty"),
        ({"images": "a.png"}, "images must be a list of paths"),
        ({"images": ["a.png"]}, r"0 slot\(s\) for 1 image\(s\); write <image> once for each image"),
        ({"prompt": "<image> Who?"}, r"1 slot\(s\) for 0 image\(s\)"),
        ({"prompt": "<image> Who?", "images": ["a.png", "b.png"]}, r"1 slot\(s\) for 2 image\(s\)"),
        ({"stereotype": 1}, "stereotype must be a group or null, found 1"),
        ({"colour": "red"}, "unknown key.*colour"),
        ({"\ud83d": 1}, r"unknown key\(s\) '\\ud83d'; known are id"),
        ({"prompt": "Who? \ud83d"}, r"the prompt holds \\ud83d, half of a character; write the whole character"),
        ({"prompt": [CHAT[0], {"role": "assistant", "content": "\ude00"}]}, r"the prompt holds \\ude00, half"),
        (
            {"candidates": candidates((" \ud83d", "female"), (" John", "male"))},
            r"the text of a candidate holds \\ud83d",
        ),
        ({"context": "\udfff"}, r"the context holds \\udfff"),
        ({"kind": "unambiguous", "answer": 1.0}, "answer must be the index of a candidate or null, found 1.0"),
        ({"candidates": ["a" * 10_000]}, "found 'a{79}...$"),
    ],
)
def test_a_bad_decision_is_refused_with_file_line_and_reason(tmp_path: Path, change: dict, reason: str) -> None:
    path = write(tmp_path / "mine.jsonl", GOOD, GOOD | {"id": "d2"} | change)
    with pytest.raises(DecisionError, match=reason) as caught:
        read_jsonl(path, groups=("female", "male"))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {key: value for key, value in GOOD.items() if key not in ("split", "answer")})
    with pytest.raises(DecisionError, match=r"mine\.jsonl:1: missing key\(s\) answer, split"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "caf\xe9"}', "not valid UTF-8 at byte 11"),
        (b'{"id": "d2",}', "not valid JSON: .* at column"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"[" * 100_000 + b"]" * 100_000, "lists and objects are nested too deeply"),
        (b'{"id": ' * 100_000 + b"1" + b"}" * 100_000, "lists and objects are nested too deeply"),
        (b'{"id": "d2", "answer": ' + b"1" * 5_000 + b"}", "a number has too many digits"),
        (json.dumps(GOOD).encode()[:-1] + b', "kind": "unambiguous"}', "the key 'kind' appears twice"),
        (json.dumps(GOOD).encode().replace(b'"text"', b'"group"'), "the key 'group' appears twice"),
        (
            json.dumps(GOOD | {"id": "a\ud83d"}).encode(),
            r"decision 'a\\ud83d': the id holds \\ud83d, half of a character",
        ),
    ],
)
def test_a_broken_line_is_refused_with_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "mine.jsonl", GOOD, GOOD | {"id": "d1b"}, line)
    with pytest.raises(DecisionError, match=rf"mine\.jsonl:3: {reason}"):
        read_jsonl(path)


def test_a_whole_emoji_is_read_however_it_is_written(tmp_path: Path) -> None:
    escaped = json.dumps(GOOD | {"prompt": "Who? \U0001f600"}).encode()
    assert b"\\ud83d\\ude00" in escaped
    plain = json.dumps(GOOD | {"id": "d2", "prompt": "Who? \U0001f600"}, ensure_ascii=False).encode()
    assert [d.text for d in read_jsonl(write(tmp_path / "set.jsonl", escaped, plain))] == ["Who? \U0001f600"] * 2


def test_people_contexts_and_templates_are_one_however_they_are_typed() -> None:
    composed, decomposed = "Jos\u00e9/Ana", "Jose\u0301/Ana"
    assert composed != decomposed
    one = make("d1", unit=composed, context=composed, template=composed, prompt=composed)
    other = make("d2", unit=decomposed, context=decomposed, template=decomposed, prompt=decomposed)
    assert (one.unit, one.context, one.template) == (other.unit, other.context, other.template)
    assert other.prompt == decomposed  # what the model reads stays as it is


def test_a_set_that_cannot_be_used_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DecisionError, match=r"empty\.jsonl: .*no decisions"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(DecisionError, match=r"absent\.jsonl: cannot be read: No such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    alone = GOOD | {"candidates": candidates((" Mary", "female"), (" Anna", "female"))}
    with pytest.raises(DecisionError, match=r"one\.jsonl: .*groups are \['female'\], expected at least two"):
        read_jsonl(write(tmp_path / "one.jsonl", alone))
    with pytest.raises(DecisionError, match="stereotype 'old', which is not among the groups female, male"):
        read_jsonl(write(tmp_path / "old.jsonl", GOOD | {"stereotype": "old"}))


def make(ident: str, **fields: object) -> Decision:
    record = GOOD | {"id": ident} | fields
    return decision_from_json(record)


def test_a_set_refuses_duplicates_and_groups_that_it_does_not_know() -> None:
    with pytest.raises(DecisionError, match="duplicate id 'd1'"):
        DecisionSet((make("d1"), make("d1")))
    with pytest.raises(DecisionError, match="'d1' has unknown group 'male'; known are abstain, female, other"):
        DecisionSet((make("d1"),), ("female", "other"))
    with pytest.raises(DecisionError, match="two different ones"):
        DecisionSet((make("d1"),), ("female", "female"))


def test_groups_leave_out_abstain_and_keep_the_order_given() -> None:
    abstaining = make("d1", candidates=candidates((" Mary", "female"), (" John", "male"), (" unsure", ABSTAIN)))
    assert DecisionSet((abstaining,)).groups == ("female", "male")
    assert DecisionSet((abstaining,), ("male", "female")).groups == ("male", "female")


def test_select_keeps_groups_and_names_the_splits_there_are() -> None:
    whole = DecisionSet((make("a"), make("b", split="test", context="pilot"), make("c", split="validation")))
    assert whole.splits == ("train", "test", "validation") and whole.contexts == ("nurse", "pilot")
    assert [d.id for d in whole.select(split="test")] == ["b"]
    assert [d.id for d in whole.select(lambda d: d.context == "nurse", kind="ambiguous")] == ["a", "c"]
    assert whole.select(split="test").groups == whole.groups
    with pytest.raises(DecisionError, match="split='tset'.*splits are train, test, validation"):
        whole.select(split="tset")
    with pytest.raises(DecisionError, match="no decision with kind='unambiguous' and the condition that was given;"):
        whole.select(lambda d: d.context == "nurse", kind="unambiguous")


def test_a_decision_cannot_be_made_wrong_in_code_either() -> None:
    with pytest.raises(DecisionError, match="decision 'x': 1 candidate"):
        Decision(id="x", context="c", kind="ambiguous", prompt="p", candidates=(Candidate(text=" a", group="g"),))


def test_targets() -> None:
    groups = ("he", "she", "they")
    assert check_target(None, groups) == (1 / 3, 1 / 3, 1 / 3)
    assert check_target({"they": 0.2, "he": 0.3, "she": 0.5}, groups) == (0.3, 0.5, 0.2)
    assert check_target({"they": 1, "he": 0, "she": 0}, groups) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ({"female": 0.5, "male": 0.4}, r"sum to 1, found .* \(sum 0.9\)"),
        ({"female": 0.7, "male": 0.7}, r"\(sum 1.4\)"),
        ({"female": -0.5, "male": 1.5}, "must be >= 0"),
        ({"female": float("nan"), "male": 1.0}, "must be >= 0"),
        ({"female": "half", "male": 0.5}, "must be numbers"),
        ({"female": 1.0}, r"names groups \['female'\], the decisions have \['female', 'male'\]"),
        ({"female": 0.5, "men": 0.5}, r"names groups \['female', 'men'\]"),
    ],
)
def test_a_bad_target_is_refused(target: dict, reason: str) -> None:
    with pytest.raises(DecisionError, match=reason):
        check_target(target, ("female", "male"))
