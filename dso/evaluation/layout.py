"""From decisions and what was answered to the cells of the two-way layout: who was asked about what, and how it fell
out.

``policy`` is an (N, K) array: row i has the probabilities of the candidates of ``decisions[i]``, 0 where that decision
has fewer than K. Decisions of one context and one unit (other orders of the people, other templates) are one cell,
their mean.

**Probability.** ``p_g(c)``, the preference, is the mean over the units that c has. Where a candidate abstains the
groups share what is left, ``p_g(c) = sum_u x[c,u,g] / sum_u m[c,u]`` with ``m = sum_g x``; a cell's deviation is then

    y[c,u,g] = e_g(c) + (x[c,u,g] - t_g m[c,u] - e_g(c) m[c,u]) / mean_u m[c,u]        e_g(c) = p_g(c) - t_g

which is ``x - t`` where nobody abstains, and in any case has the mean ``e_g(c)`` over units (a ratio, linearised).

**Log-odds.** The centred log-ratio of a decision, ``log p_g - mean_h log p_h`` over the groups it offers, less the same
of the target. With two groups its components are half of ``log (p_a / p_b)`` less the target's, with either sign.

A decision that offers some of the groups is held against the target restricted to those (two of four groups against
1/2, 1/2); a group that is not offered deviates by 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dso.decisions.decision import ABSTAIN, Decision, DecisionError, DecisionSet
from dso.evaluation.twoway import Array, Cells, Indices, sums_by


@dataclass(frozen=True)
class Layout:
    """Where each of N decisions belongs and what it offers.

    ``offer`` (N, K, G + 1): candidate k stands for group g, the last column is abstention. ``fair`` (N, G): the
    target among the groups offered. ``signs`` (C, G): +1 at the stereotype's group and -1 at the others. ``context``,
    ``unit`` and ``question`` (N,) are numbers; the decisions of one question differ in the order of the people only.
    """

    offer: NDArray[np.bool_]
    fair: Array
    signs: Array
    contexts: tuple[str, ...]
    context: Indices
    unit: Indices
    units: int
    question: Indices

    @classmethod
    def of(cls, asked: Sequence[Decision], groups: Sequence[str], width: int, target: Array) -> Layout:
        """The layout of ambiguous decisions; ``width`` is the K of their policy.

        Raises:
            DecisionError: if a decision offers only groups whose fair share is zero.
        """
        column = {group: i for i, group in enumerate((*groups, ABSTAIN))}
        offer = np.zeros((len(asked), width, len(column)), dtype=bool)
        for n, decision in enumerate(asked):
            for k, candidate in enumerate(decision.candidates):
                offer[n, k, column[candidate.group]] = True
        fair = offer[:, :, :-1].any(axis=1) * target
        if not fair.any(axis=1).all():
            culprit = asked[int(fair.sum(axis=1).argmin())]
            raise DecisionError(f"decision {culprit.id!r} offers only groups whose fair share is 0")
        contexts, context = numbered([d.context for d in asked])
        units, unit = numbered([d.unit or d.id for d in asked])
        return cls(
            offer=offer,
            fair=fair / fair.sum(axis=1, keepdims=True),
            signs=_stereotypes(asked, groups, contexts),
            contexts=contexts,
            context=context,
            unit=unit,
            units=len(units),
            question=numbered([(d.context, d.unit or d.id, d.template) for d in asked])[1],
        )

    def answers(self, table: Array) -> Array:
        """(N, G + 1): probability of each group, and of abstention."""
        return np.einsum("nk,nkg->ng", table, self.offer)

    def shares(self, table: Array) -> Array:
        """(C, G): the preferences ``p_g(c)``; nan where no group was ever chosen."""
        context, _, means = self._cells(self.answers(table)[:, :-1])
        total = sums_by(context, means, len(self.contexts))
        mass = total.sum(axis=1, keepdims=True)
        return np.where(mass > 0, total / np.where(mass > 0, mass, 1.0), np.nan)

    def probability(self, table: Array) -> Cells:
        """The cells' deviations in probability; a unit that never chooses a group in a context has no cell there."""
        chosen = self.answers(table)[:, :-1]
        mass = chosen.sum(axis=1, keepdims=True)
        context, unit, means = self._cells(np.concatenate([chosen - self.fair * mass, mass], axis=1))
        kept = means[:, -1] > 0
        context, unit, amount, mass = context[kept], unit[kept], means[kept, :-1], means[kept, -1:]
        count = len(self.contexts)
        total = sums_by(context, mass, count)
        deviation = (sums_by(context, amount, count) / np.where(total > 0, total, 1.0))[context]
        average = (total / np.maximum(np.bincount(context, minlength=count), 1)[:, None])[context]
        return Cells(context, unit, deviation + (amount - deviation * mass) / average, count)

    def log_odds(self, table: Array) -> Cells | None:
        """The cells' deviations in log-odds; None where an answer has probability 0, as in frequencies of samples."""
        offered = self.offer[:, :, :-1].any(axis=1) & (self.fair > 0)
        chosen = self.answers(table)[:, :-1]
        if (chosen[offered] <= 0).any():
            return None
        values = _centred(chosen, offered) - _centred(self.fair, offered)
        return Cells(*self._cells(values), len(self.contexts))

    def order_effects(self, table: Array) -> tuple[Indices, Array]:
        """The unit and the order effect of every question that is asked in several orders, (Q,) each.

        The effect is the mean over pairs of orders of ``1/2 sum_g |pi_1(g) - pi_2(g)|``: 0 where the order does not
        matter, 1 where it decides alone; abstention counts as one more answer.
        """
        answers = self.answers(table)
        count = np.bincount(self.question)
        order = np.argsort(self.question, kind="stable")
        starts = np.cumsum(count) - count
        total = np.zeros(len(count))
        for one in range(int(count.max())):
            for other in range(one + 1, int(count.max())):
                asked = np.flatnonzero(count > other)
                rows, others = order[starts[asked] + one], order[starts[asked] + other]
                total[asked] += np.abs(answers[rows] - answers[others]).sum(axis=1) / 2
        several = count > 1
        return self.unit[order[starts]][several], total[several] / (count * (count - 1) / 2)[several]

    def _cells(self, values: Array) -> tuple[Indices, Indices, Array]:
        """Means over the decisions of each context and unit."""
        cells, member = np.unique(self.context * self.units + self.unit, return_inverse=True)
        count = np.bincount(member)[:, None]
        means = sums_by(member, values, len(cells)) / count
        return cells // self.units, cells % self.units, means


def numbered(names: Sequence[object]) -> tuple[tuple, Indices]:
    """The different names in order of first appearance, and the number of each."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return tuple(number), np.array([number[name] for name in names], dtype=np.intp)


def checked(probs: ArrayLike, decisions: DecisionSet) -> Array:
    """The policy as floats, one row a decision.

    Raises:
        ValueError: if a row is not a policy over the candidates of its decision.
    """
    table = np.asarray(probs, dtype=np.float64)
    sizes = np.array([len(d.candidates) for d in decisions])
    rows, most = len(decisions), sizes.max()
    if table.ndim != 2 or table.shape[0] != rows or table.shape[1] < most:
        raise ValueError(f"probs must be ({rows}, {most} or more), one row a decision; found {table.shape}")
    real = np.arange(table.shape[1]) < sizes[:, None]
    fits = np.isfinite(table).all(axis=1) & (table >= 0).all(axis=1) & ~(table * ~real).any(axis=1)
    fits &= np.abs(table.sum(axis=1) - 1) < 1e-3
    if not fits.all():
        row = int(fits.argmin())
        raise ValueError(
            f"probs[{row}] (decision {decisions[row].id!r}) is {table[row].tolist()}; expected {sizes[row]} "
            "probabilities that sum to 1, then zeros"
        )
    return table


def _centred(shares: Array, offered: NDArray[np.bool_]) -> Array:
    """Logarithms less their mean over the groups offered, 0 for the others."""
    logs = np.where(offered, np.log(np.where(offered, shares, 1.0)), 0.0)
    return np.where(offered, logs - logs.sum(axis=1, keepdims=True) / offered.sum(axis=1, keepdims=True), 0.0)


def _stereotypes(asked: Sequence[Decision], groups: Sequence[str], contexts: Sequence[str]) -> Array:
    found: dict[str, set[str]] = {context: set() for context in contexts}
    for decision in asked:
        if decision.stereotype is None:
            continue
        if decision.stereotype not in groups:
            raise DecisionError(
                f"decision {decision.id!r} has stereotype {decision.stereotype!r}; groups are {', '.join(groups)}"
            )
        found[decision.context].add(decision.stereotype)
    # A context whose decisions name different stereotypes has none of its own.
    return np.array([[_sign(group, found[context]) for group in groups] for context in contexts])


def _sign(group: str, stereotypes: set[str]) -> float:
    if len(stereotypes) != 1:
        return 0.0
    return 1.0 if group in stereotypes else -1.0
