"""Rewards of written answers: the numbers of candidate rewards, from whom each completion names, in all processes."""

from __future__ import annotations

import pytest
import torch
from small_runs import letters_set
from tiny import byte_tokenizer, tiny_llama

from dso.decisions.decision import DecisionError
from dso.decisions.matching import Matcher
from dso.models.backbone import Backbone
from envs.freeform import AnswerRewards
from envs.reward import RewardConfig
from envs.task import DecisionTask

LETTERS = {"female": "A", "male": "H"}
NURSE, PILOT, FACT_A, FACT_H = 0, 4, 16, 17  # decisions of letters_set: of two contexts, and two that have an answer


def make_task(letters: dict[str, str] = LETTERS, **reward) -> DecisionTask:
    """The preference is that of the batch alone; rewards reach +-1 half a unit from parity."""
    config = RewardConfig(
        **{"form": "smooth", "width": 0.5, "estimate": "context", "decay": 0.0, "batch_weight": 1.0, **reward}
    )
    return DecisionTask(Backbone(tiny_llama(), byte_tokenizer(), "tiny"), letters_set(letters=letters), None, config)


def pay(rewards: AnswerRewards, indices: list[int], texts: list) -> tuple[list, list]:
    """Both rewards, called as TRL calls them."""
    known = {"completion_ids": [[0]] * len(texts), "index": indices, "trainer_state": None, "log_metric": None}
    prompts = ["?"] * len(texts)
    return rewards.equiprobability(prompts, texts, **known), rewards.correctness(prompts, texts, **known)


def test_answers_to_ambiguous_decisions_are_paid_by_how_they_were_shared() -> None:
    rewards = AnswerRewards(make_task(), Matcher())
    fair, right = pay(rewards, [NURSE] * 4 + [PILOT] * 2, ["A", " it is A.", "H", "nobody", "H", "A"])
    # Two of three nurses are A: a preference of 2/3, a sixth from fair, a third of the width.
    assert fair == pytest.approx([-1 / 3, -1 / 3, 1 / 3, -1, 0, 0])
    assert right == [None] * 6
    assert rewards.abstention == pytest.approx(1 / 6)


def test_answers_to_unambiguous_decisions_are_paid_for_being_right() -> None:
    fair, right = pay(AnswerRewards(make_task(), Matcher()), [FACT_A] * 3 + [FACT_H], ["A", "H", "x", "H"])
    assert right == [1.0, -1.0, -1.0, 1.0]
    assert fair == [None] * 4


def test_both_kinds_in_one_batch() -> None:
    fair, right = pay(AnswerRewards(make_task(), Matcher()), [FACT_A, NURSE, NURSE], ["H", "A", "A"])
    assert fair == [None, -1.0, -1.0]
    assert right == [-1.0, None, None]


def test_naming_nobody_has_its_own_reward() -> None:
    fair, _ = pay(AnswerRewards(make_task(abstain=-0.25), Matcher()), [NURSE, NURSE], ["x", "H"])
    assert fair == [-0.25, -1.0]  # the one answer that counts is H


def test_where_all_abstain_the_preference_stays() -> None:
    task = make_task(decay=0.5)
    before = task.preference.clone()
    fair, _ = pay(AnswerRewards(task, Matcher()), [NURSE] * 3, ["x", "y", "z"])
    assert fair == [-1.0] * 3
    assert torch.equal(task.preference, before)


def test_a_conversation_is_read_in_its_last_message() -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("H", "A", "A")]
    fair, _ = pay(AnswerRewards(make_task(), Matcher()), [NURSE] * 3, said)
    assert fair == pytest.approx([1 / 3, -1 / 3, -1 / 3])


def test_the_answers_of_all_processes_count() -> None:
    halves = ([NURSE, NURSE], ["A", "A"]), ([NURSE + 1, NURSE + 1], ["H", "H"])
    alone, _ = pay(AnswerRewards(make_task(), Matcher()), *halves[0])
    assert alone == [-1.0, -1.0]
    tasks, paid = [], []
    for rank in (0, 1):
        task = make_task(decay=0.5)
        rewards = AnswerRewards(task, Matcher())
        others = rewards._read(halves[1 - rank][1], halves[1 - rank][0])
        rewards.gather = lambda own, others=others, rank=rank: torch.cat([own, others] if rank == 0 else [others, own])
        tasks.append(task)
        paid.append(pay(rewards, *halves[rank])[0])
    assert paid == [[0.0, 0.0], [0.0, 0.0]]  # two of each: parity, however they are divided
    whole = make_task(decay=0.5)
    pay(AnswerRewards(whole, Matcher()), halves[0][0] + halves[1][0], halves[0][1] + halves[1][1])
    for task in tasks:
        assert torch.equal(task.preference, whole.preference)


def test_a_context_that_is_asked_in_blocks_has_the_blocked_estimate() -> None:
    task = make_task(estimate="blocked", local_weight=1.0, unit_weight=0.0)
    indices = [0, 4, 8, 12]  # one block: the same people and template in the four contexts
    fair, _ = pay(AnswerRewards(task, Matcher()), indices, ["A", "H", "A", "H"])
    expected = DecisionTask(task.backbone, task.decisions, None, task.reward)
    choice = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    table = expected.observe(indices, choice)
    assert fair == pytest.approx([float(table[row, column]) for row, column in enumerate((0, 1, 0, 1))])


def test_a_matcher_that_can_name_nobody_is_refused_at_once() -> None:
    with pytest.raises(DecisionError, match="can never name the candidate 'a'"):
        AnswerRewards(make_task({"female": "A", "male": "a"}), Matcher(ignore_case=True))
