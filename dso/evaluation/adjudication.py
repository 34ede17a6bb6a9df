"""Two models judge each other's answers, and what they agree on becomes decisions to train on.

Cross-model adjudication, as two rules of our own; no answer that comes with a decision is looked at. Each model has a
policy over a decision's candidates, and as a judge says how far the text supports each candidate: it reads the text
with the candidate filled in and is asked whether the text states that, or a stereotype alone suggests it,

    support[k] = P(yes | k) / sum_j P(yes | j)        a share, so that a judge who likes to say yes gains nothing

A decision becomes

    a fact    (unambiguous) if both models give the same answer, and each one's answer is supported by the other judge
    fair      (ambiguous)   if no judge finds any answer supported, and the preferences of both, over the orders of the
                            people, are near to equal shares and to each other

and else nothing: the models disagree, or are biased, or one reads what the other does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dso.decisions.decision import Candidate, Decision, DecisionSet
from dso.models.backbone import Backbone

Array = NDArray[np.float64]
JUDGE = (
    "{text}{answer}.\n\nQuestion: Does the text state this, so that it is no guess from a stereotype? Answer yes or no."
    "\nAnswer:"
)
YES_NO = (Candidate(text=" yes", group="yes"), Candidate(text=" no", group="no"))


@dataclass(frozen=True, kw_only=True)
class Ruling:
    """What came out of one decision.

    Attributes:
        decision: that was asked.
        policies: (2, K) of the two models.
        supports: (2, K) by the two judges.
        made: the decision to train on; None if there is none.
    """

    decision: Decision
    policies: Array
    supports: Array
    made: Decision | None


def adjudicate(
    first: Backbone, second: Backbone, decisions: DecisionSet, *, support: float = 0.6, near: float = 0.1
) -> list[Ruling]:
    """Let two models judge each other's answers to N decisions.

    Args:
        first, second: may share a model: the answers of the first are taken before the second is asked.
        support: share from which on a judge finds an answer supported.
        near: total variation up to which preferences are near to equal shares, and to each other.
    """
    return rule(decisions, [heard(model, decisions) for model in (first, second)], support=support, near=near)


def heard(model: Backbone, decisions: DecisionSet) -> tuple[list[Array], list[Array]]:
    """What one model has to say of N decisions, as it is now: its policies and its supports, (K,) each."""
    return policies(model, decisions), supports(model, decisions)


def rule(
    decisions: DecisionSet, said: Sequence[tuple[list[Array], list[Array]]], *, support: float, near: float
) -> list[Ruling]:
    """The rulings, from what each of two models said (:func:`heard`); see :func:`adjudicate`."""
    (own, own_judge), (other, other_judge) = said
    preferences = [_preferences(decisions, found) for found in (own, other)]
    rulings = []
    for place, decision in enumerate(decisions):
        pair, judged = np.stack([own[place], other[place]]), np.stack([own_judge[place], other_judge[place]])
        answers = pair.argmax(1)
        shares = [found[_question(decision)] for found in preferences]
        made = None
        # Each model's answer before the other one as its judge.
        if answers[0] == answers[1] and judged[1, answers[0]] >= support and judged[0, answers[1]] >= support:
            made = replace(decision, kind="unambiguous", answer=int(answers[0]))
        elif judged.max() < support and _near(shares, near):
            made = replace(decision, kind="ambiguous", answer=None)
        rulings.append(Ruling(decision=decision, policies=pair, supports=judged, made=made))
    return rulings


def agreed(rulings: Sequence[Ruling], groups: Sequence[str], name: str = "agreed") -> DecisionSet:
    """The decisions that were made.

    Raises:
        DecisionError: if there are none.
    """
    return DecisionSet(tuple(ruling.made for ruling in rulings if ruling.made is not None), tuple(groups), name)


@torch.no_grad()
def policies(model: Backbone, decisions: Sequence[Decision] | DecisionSet) -> list[Array]:
    """The policy over each decision's own candidates."""
    found = model.score(list(decisions)).policy().exp().double().cpu().numpy()
    return [row[: len(decision.candidates)] for row, decision in zip(found, decisions, strict=True)]


def supports(judge: Backbone, decisions: Sequence[Decision] | DecisionSet) -> list[Array]:
    """How far the text of each decision supports each of its candidates, by one judge; shares that sum to 1."""
    asked, sizes = [], []
    for decision in decisions:
        sizes.append(len(decision.candidates))
        for number, candidate in enumerate(decision.candidates):
            prompt = JUDGE.format(text=_text(decision), answer=candidate.text)
            ident, plain = f"{decision.id}/{number}", replace(decision, kind="ambiguous", answer=None, stereotype=None)
            asked.append(replace(plain, id=ident, prompt=prompt, candidates=YES_NO))
    yes = np.array([row[0] for row in policies(judge, asked)])
    return [part / part.sum() for part in np.split(yes, np.cumsum(sizes)[:-1])]


def _text(decision: Decision) -> str:
    prompt = decision.prompt
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt) + "\n"


def _question(decision: Decision) -> tuple[str, str, str]:
    return decision.context, decision.unit or decision.id, decision.template


def _preferences(decisions: DecisionSet, found: Sequence[Array]) -> dict[tuple[str, str, str], Array]:
    """The mean share of each group in every question, over the orders of its people."""
    rows: dict[tuple[str, str, str], list[Array]] = {}
    for decision, policy in zip(decisions, found, strict=True):
        given = [[c.group == group for c in decision.candidates] for group in decisions.groups]
        rows.setdefault(_question(decision), []).append(np.array(given, float) @ policy)
    return {question: np.mean(shares, axis=0) for question, shares in rows.items()}


def _near(shares: Sequence[Array], limit: float) -> bool:
    own, other = shares
    pairs = ((own, np.full_like(own, 1 / len(own))), (other, np.full_like(own, 1 / len(own))), (own, other))
    return all(np.abs(a - b).sum() / 2 <= limit for a, b in pairs)
