"""The base model's association: what is put into log-odds is found again, and taken out of the policy alone."""

from __future__ import annotations

import math

import pytest
import torch

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionSet
from envs.association import fit_association, forgive_blocks, without_association
from envs.layout import Layout

CONTEXTS, TEMPLATES, UNITS = 6, 4, 30


def simulated(
    groups: tuple[str, ...], *, offered: int | None = None, abstain: bool = False
) -> tuple[DecisionSet, torch.Tensor, dict[str, torch.Tensor]]:
    """Decisions of all contexts about every unit, each unit in one template, two orders; and the log-odds behind."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(CONTEXTS, len(groups), generator=generator)
    context = context - context.mean(0) - context.mean(1, keepdim=True) + context.mean()
    common = 0.4 * torch.randn(TEMPLATES, len(groups), generator=generator)
    common = common - common.mean(1, keepdim=True)
    sensitivity = torch.tensor([0.4, 0.8, 1.2, 1.6])
    decisions, logits = [], []
    for unit in range(UNITS):
        template = unit % TEMPLATES
        people = 1.5 * torch.randn(len(groups), generator=generator)
        for c in range(CONTEXTS):
            chosen = torch.randperm(len(groups), generator=generator)[: offered or len(groups)].tolist()
            for order in (1, -1):
                shown = chosen[::order]
                place = torch.linspace(1.0, -1.0, len(shown))  # the first person is preferred
                own = sensitivity[template] * context[c] + common[template] + people
                rest = 0.3 * torch.randn(len(shown), generator=generator)
                names = [Candidate(text=f" {groups[g]}{unit}", group=groups[g]) for g in shown]
                row = own[shown] + place + rest
                if abstain:
                    names, row = (
                        [*names, Candidate(text=" nobody", group=ABSTAIN)],
                        torch.cat([row, torch.tensor([0.5])]),
                    )
                decisions.append(
                    Decision(
                        id=f"{unit}-{c}-{order}",
                        context=f"c{c}",
                        kind="ambiguous",
                        prompt="?",
                        candidates=tuple(names),
                        template=f"t{template}",
                        unit=f"u{unit}",
                    )
                )
                logits.append(row)
    table = torch.stack(logits).log_softmax(-1)
    truth = {"context": context, "common": common, "sensitivity": sensitivity}
    return DecisionSet(tuple(decisions), groups, "simulated"), table, truth


@pytest.mark.parametrize(
    ("groups", "offered", "error"), [(("f", "m"), None, 0.12), (("a", "b", "c"), None, 0.12), (("a", "b", "c"), 2, 0.2)]
)
def test_association_is_found_whatever_people_are_liked_and_in_whatever_order(
    groups: tuple[str, ...], offered: int | None, error: float
) -> None:
    decisions, table, truth = simulated(groups, offered=offered)
    layout = Layout.of(decisions)
    found = fit_association(table, torch.arange(len(decisions)), layout, len(groups))
    # A cell has rest of 0.3 / sqrt(2), a context 30 of them: an error of 0.04, about 0.06 with the ridge.
    # Where two of three groups are offered, people are known from two questions in three.
    scaled = truth["sensitivity"][:, None, None] * truth["context"]
    assert (found.sensitivity[:, None, None] * found.context - scaled).square().mean().sqrt() < error
    # The common part is known up to the liking for the 7 or 8 units of a template (1.5 / sqrt(7.5) = 0.55), and shrunk.
    assert (found.common - truth["common"]).square().mean().sqrt() < 0.5
    assert found.sensitivity.mean() == pytest.approx(1, abs=0.15)
    torch.testing.assert_close(found.context.sum(0), torch.zeros(len(groups)), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.common.sum(1), torch.zeros(TEMPLATES), atol=1e-5, rtol=0)


def test_wanted_policy_keeps_order_and_people_and_loses_the_context() -> None:
    decisions, table, _ = simulated(("f", "m"))
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    wanted = without_association(table, index, layout, torch.tensor([0.5, 0.5]))
    first = torch.where(layout.groups[:, 0] == 0, 1.0, -1.0)
    before, after = (first * (log[:, 0] - log[:, 1]) for log in (table, wanted))
    # Both orders of a question move by the same amount: what differs between them is as it was.
    torch.testing.assert_close((before - after)[::2], (before - after)[1::2])
    cells = lambda values: values.view(UNITS, CONTEXTS, 2).mean((0, 2))  # noqa: E731
    assert cells(before).std() > 0.8
    assert cells(after).std() < 0.12
    shares = (wanted.exp() * (layout.groups == 0)).sum(1)
    assert shares.mean() == pytest.approx(0.5, abs=1e-3)


def test_target_of_unequal_shares_is_met_and_abstention_keeps_its_odds_by_group_mean() -> None:
    decisions, table, _ = simulated(("f", "m"), abstain=True)
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    wanted = without_association(table, index, layout, torch.tensor([0.7, 0.3]))
    named = wanted.exp()[:, :2]
    female = (wanted.exp() * (layout.groups == 0)).sum()
    assert float(female / named.sum()) == pytest.approx(0.7, abs=2e-3)


def test_abstention_keeps_its_odds_against_the_groups_that_a_decision_offers() -> None:
    decisions, table, _ = simulated(("a", "b", "c", "d"), offered=2, abstain=True)
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    wanted = without_association(table, index, layout, torch.full((4,), 0.25), 0.2, 0.15)
    odds = lambda log: log[:, 2] - log[:, :2].mean(1)  # noqa: E731
    torch.testing.assert_close(odds(wanted), odds(table), atol=1e-5, rtol=0)
    named = lambda log: log[:, 0] - log[:, 1]  # noqa: E731
    assert (named(wanted) - named(table)).abs().mean() > 0.3


def test_contexts_that_offer_groups_of_their_own_lose_what_they_add() -> None:
    # Two topics with groups of their own, each asked about in two opposite contexts: +-1 in log-odds, equally liked.
    decisions, rows = [], []
    for topic, pair in (("x", ("a", "b")), ("y", ("c", "d"))):
        for unit in range(20):
            for sign, side in ((1, "neg"), (-1, "nonneg")):
                decisions.append(
                    Decision(
                        id=f"{topic}{unit}{side}", context=f"{topic}/{side}", kind="ambiguous", prompt="?",
                        candidates=tuple(Candidate(text=f" {g}", group=g) for g in pair), template=topic,
                        unit=f"{topic}{unit}",
                    )
                )  # fmt: skip
                rows.append([0.5 * sign, -0.5 * sign])
    layout = Layout.of(DecisionSet(tuple(decisions), name="topics"))
    table = torch.tensor(rows).log_softmax(-1)
    wanted = without_association(table, torch.arange(80), layout, torch.full((4,), 0.25), 0.2)
    left = (wanted[:, 0] - wanted[:, 1]) / (table[:, 0] - table[:, 1])
    # A context has 20 questions of half an own residual each, (1 - share)^2 and so on: the ridge leaves a twentieth.
    assert left.max() < 0.12 and left.min() > -0.02


def test_common_part_stays_where_it_is_to_be_left() -> None:
    decisions, table, _ = simulated(("f", "m"))
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    kept = without_association(table, index, layout, torch.tensor([0.5, 0.5]), common_weight=0.0)
    female = lambda log: torch.where(layout.groups[:, 0] == 0, log[:, 0] - log[:, 1], log[:, 1] - log[:, 0])  # noqa: E731
    assert float((female(kept) - female(table)).mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("groups", [("f", "m"), ("a", "b", "c")])
def test_a_share_of_the_order_is_taken_off_and_nothing_else(groups: tuple[str, ...]) -> None:
    decisions, table, _ = simulated(groups)
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    target = torch.full((len(groups),), 1 / len(groups))
    kept, less = (without_association(table, index, layout, target, 0.2, weight) for weight in (0.0, 0.25))

    def by_group(log: torch.Tensor) -> torch.Tensor:
        return log.gather(1, layout.groups.argsort(1)).view(-1, 2, len(groups)).log_softmax(-1)  # two orders a question

    before, after = by_group(kept), by_group(less)
    odds = lambda log: log[..., :1] - log[..., 1:]  # noqa: E731
    torch.testing.assert_close(odds(after).mean(1), odds(before).mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        odds(after)[:, 0] - odds(after)[:, 1], 0.75 * (odds(before)[:, 0] - odds(before)[:, 1]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_the_target_counts_by_the_same_share_as_the_common_part(weight: float) -> None:
    decisions, table, _ = simulated(("f", "m"))
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    first = torch.where(layout.groups[:, 0] == 0, 1.0, -1.0)
    fair, unequal = (
        without_association(table, index, layout, torch.tensor(target), weight) for target in ([0.5, 0.5], [0.7, 0.3])
    )
    moved = first * ((unequal - fair)[:, 0] - (unequal - fair)[:, 1])
    torch.testing.assert_close(moved, torch.full_like(moved, weight * math.log(0.7 / 0.3)), atol=1e-5, rtol=0)


def test_questions_without_units_or_templates_are_shrunk_by_hand() -> None:
    # One context per question and no unit: each question is a block of its own. Two contexts, one question each, with
    # log-odds +-1 (halves +-0.5 a group). Quasi-demeaning leaves 1/sqrt(7) of each; with ridge 1 the contexts take
    # (1/7) / (1/7 + 1) = 1/8 of what is asked of them.
    def decision(name: str, context: str) -> Decision:
        candidates = (Candidate(text=" A", group="f"), Candidate(text=" B", group="m"))
        return Decision(id=name, context=context, kind="ambiguous", prompt="?", candidates=candidates)

    decisions = DecisionSet((decision("1", "x"), decision("2", "y")), ("f", "m"), "two")
    table = torch.tensor([[0.5, -0.5], [-0.5, 0.5]]).log_softmax(-1)
    found = fit_association(table, torch.arange(2), Layout.of(decisions), 2)
    torch.testing.assert_close(found.context[:, 0], torch.tensor([0.5 / 8, -0.5 / 8]), atol=1e-5, rtol=0)
    assert math.isclose(float(found.sensitivity[0]), 1.0, abs_tol=1e-6)


@pytest.mark.parametrize("groups", [("f", "m"), ("a", "b", "c")])
def test_what_a_block_misses_in_all_contexts_counts_for_its_weight(groups: tuple[str, ...]) -> None:
    decisions, table, _ = simulated(groups)
    layout, index = Layout.of(decisions), torch.arange(len(decisions))
    wanted = without_association(table, index, layout, torch.full((len(groups),), 1 / len(groups)))
    free = (table + 0.2 * torch.randn(table.shape, generator=torch.Generator().manual_seed(1))).requires_grad_()

    def errors(target: torch.Tensor) -> torch.Tensor:  # by group, in log-odds against the mean of all
        moved = (free - target).gather(1, layout.groups.argsort(1))
        return moved - moved.mean(1, keepdim=True)

    error = errors(wanted)
    mean = error.view(UNITS, -1, len(groups)).mean(1, keepdim=True).expand(-1, CONTEXTS * 2, -1).reshape(error.shape)
    (stated,) = torch.autograd.grad(((error - mean) ** 2).sum() + 0.3 * (mean**2).sum(), free)
    shifted = forgive_blocks(wanted, free.detach(), index, layout, len(groups), 0.3)
    (found,) = torch.autograd.grad((errors(shifted) ** 2).sum(), free)
    torch.testing.assert_close(found, stated, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shifted.logsumexp(1), torch.zeros(len(decisions)), atol=1e-5, rtol=0)
    # Whoever is there already is asked for nothing, and with a weight of 1 nothing is forgiven.
    torch.testing.assert_close(forgive_blocks(wanted, wanted, index, layout, len(groups), 0.3), wanted)
    torch.testing.assert_close(forgive_blocks(wanted, free.detach(), index, layout, len(groups), 1.0), wanted)


def test_a_block_in_one_context_is_forgiven_nothing() -> None:
    decisions, table, _ = simulated(("f", "m"))
    one = decisions.select(lambda decision: decision.context == "c0")
    index = torch.tensor([place for place, decision in enumerate(decisions) if decision.context == "c0"])
    wanted = without_association(table, torch.arange(len(table)), Layout.of(decisions), torch.tensor([0.5, 0.5]))
    kept = forgive_blocks(wanted[index], table[index], torch.arange(len(one)), Layout.of(one), 2, 0.3)
    assert (wanted - table)[index].abs().max() > 0.3
    torch.testing.assert_close(kept, wanted[index])
