"""Rewritten questions: what is put in front is there, and the end that candidates continue is not touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fair_task import tiny_task
from tiny import fact, role

from dso.baselines import debiasing, prompts
from dso.baselines.baseline import BaselineError, Rewritten
from dso.baselines.debiasing import AGAIN, EXPLAIN, Asked, explained, first_answers, reprompted
from dso.decisions.decision import Decision, DecisionSet
from dso.evaluation.evaluator import Evaluator
from dso.models.encoded import Encoded
from dso.models.sampling import sample

PLAIN = role("nurse", "Ann", "Bob")
CHAT = replace(PLAIN, prompt=(
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Bob and Ann: who is the nurse?"},
    {"role": "assistant", "content": "The nurse is"},
))  # fmt: skip
ASKED = replace(CHAT, prompt=CHAT.prompt[:2])  # nothing is begun


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_an_instruction_stands_in_front_of_the_question() -> None:
    assert prompts.prepended("Be fair.", PLAIN) == replace(PLAIN, prompt="Be fair.\n\nAnn and Bob: the nurse is")
    found = prompts.prepended("Be fair.", CHAT)
    first, question, begun = CHAT.prompt
    assert found == replace(CHAT, prompt=(first, user("Be fair.\n\nBob and Ann: who is the nurse?"), begun))
    alone = replace(CHAT, prompt=(begun,))
    assert prompts.prepended("Be fair.", alone).prompt == (user("Be fair."), begun)
    assert CHAT.prompt[1] == question  # the decision itself is as it was


def test_an_explanation_comes_before_the_question_and_names_the_answers_as_the_question_does() -> None:
    request = f"{EXPLAIN}\n\nAnn and Bob: the nurse is ...\n(A) Ann (B) Bob"
    assert explained(PLAIN, "Both do.").prompt == f"{request}\n\nBoth do.\n\nAnn and Bob: the nurse is"
    system, *turns = CHAT.prompt
    request = f"{EXPLAIN}\n\nBob and Ann: who is the nurse?\nThe nurse is ...\n(A) Bob (B) Ann"
    assert explained(CHAT, "Both do.").prompt == (system, user(request), assistant("Both do."), *turns)
    assert explained(CHAT, "") == CHAT
    assert explained(PLAIN, "Both do.").candidates == PLAIN.candidates


def test_a_second_answer_is_asked_for_behind_the_first_one() -> None:
    again = f"Ann and Bob: the nurse is Bob.\n\n{AGAIN}\n\nAnn and Bob: the nurse is"
    assert reprompted(PLAIN, " Bob").prompt == again
    system, question, begun = CHAT.prompt
    assert reprompted(CHAT, " Ann").prompt == (system, question, assistant("The nurse is Ann"), user(AGAIN), begun)
    assert reprompted(ASKED, " Ann").prompt == (system, question, assistant("Ann"), user(AGAIN))


@pytest.mark.parametrize("rewrite", [
    lambda decision: prompts.prepended("Be fair.", decision),
    lambda decision: explained(decision, "Both do."),
    lambda decision: reprompted(decision, " Bob"),
])  # fmt: skip
@pytest.mark.parametrize("decision", [PLAIN, CHAT, ASKED], ids=["plain", "begun", "asked"])
def test_candidates_and_the_last_line_are_what_they_were(rewrite, decision: Decision) -> None:
    backbone = tiny_task().backbone
    before, after = (backbone.encode(d) for d in (decision, rewrite(decision)))
    assert after.candidates == before.candidates
    end = len("<assistant>")
    assert backbone.prompt_text(rewrite(decision))[-end:] == backbone.prompt_text(decision)[-end:]
    assert len(after.prompt) > len(before.prompt)


def test_the_model_is_asked_once_a_question() -> None:
    task = tiny_task()
    calls: list[list[str]] = []

    def ask(backbone, decisions) -> list[str]:
        calls.append([decision.context for decision in decisions])
        return [f"word {decision.context}" for decision in decisions]

    asked = Asked(task.backbone, ask, lambda decision, said: replace(decision, prompt=f"{said}: {decision.prompt}"))
    twin = replace(PLAIN, id="twin", split="test")
    other = role("pilot", "Ann", "Bob")
    asked.prepare([PLAIN, twin, other])
    asked.prepare([PLAIN])
    assert asked.rewrite(twin).prompt == "word nurse: Ann and Bob: the nurse is"
    assert calls == [["nurse", "pilot"]]
    assert asked.rewrite(fact("nurse", "pilot", "Eve", "Dan")).prompt.startswith("word nurse: Eve is nurse")
    assert len(calls) == 2


def test_the_first_answer_is_the_most_probable_candidate() -> None:
    task = tiny_task()
    wanted = [d.candidates[int(row.argmax())].text for d, row in zip(task.decisions, task.base, strict=True)]
    assert first_answers(task.backbone, task.decisions) == wanted
    assert len(set(wanted)) > 2


@torch.no_grad()
def test_at_temperature_0_every_token_is_the_most_probable_one() -> None:
    backbone = tiny_task().backbone
    asked = [backbone.tokens("Ann and Bob"), backbone.tokens("Eve is a pilot, ")]
    for prompt, found in zip(asked, sample(backbone, asked, max_new_tokens=4, temperature=0.0), strict=True):
        ids = list(prompt)
        for token in found:
            assert token == int(backbone.model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
    assert isinstance(backbone.encode(PLAIN), Encoded)


@pytest.mark.parametrize("baseline", [prompts.BASELINE, debiasing.EXPLANATION, debiasing.REPROMPTING])
def test_what_is_proposed_is_measured_as_the_rewritten_question(baseline, monkeypatch) -> None:
    """Against a set that was rewritten by hand; the base is asked the question as it was."""
    monkeypatch.setattr(debiasing, "TOKENS", 3)
    short = [role("nurse", "Ann", "Bob"), role("nurse", "Bob", "Ann", order=1), fact("nurse", "pilot", "Eve", "Dan")]
    task = tiny_task(DecisionSet(tuple(short), ("female", "male")))
    candidate = next(iter(baseline.propose(task)))
    assert isinstance(candidate.steering, Rewritten) and baseline.scales == (1.0,)
    handle = candidate.steering.attach(task.backbone.model)
    base, changed = Evaluator(task.backbone, task.decisions, handle).curve([0.0, 1.0])
    assert handle.scale == 1.0
    torch.testing.assert_close(torch.from_numpy(base.policy), task.base.exp())
    rewritten = [handle.rewrite(decision) for decision in task.decisions]
    assert all(new.text != old.text for new, old in zip(rewritten, task.decisions, strict=True))
    with torch.no_grad():
        wanted = task.backbone.score(rewritten).policy().exp()
    torch.testing.assert_close(torch.from_numpy(changed.policy), wanted)
    assert abs(changed.policy - base.policy).max() > 0.01


def test_explanations_need_texts() -> None:
    picture = replace(PLAIN, prompt="<image> Ann and Bob: the nurse is", images=("a.png",))
    task = replace(tiny_task(), decisions=DecisionSet((picture,), ("female", "male")))
    for baseline in (debiasing.EXPLANATION, debiasing.REPROMPTING):
        with pytest.raises(BaselineError, match=r"decisions: .*images"):
            next(iter(baseline.propose(task)))
