"""What every baseline is: something that proposes candidates, each of which can be attached to a model with a scale.

A baseline is a file with one :class:`Baseline`. It is given a :class:`Task`, the same for all of them, and proposes
candidates (a layer, a rank, a learning rate), the most promising first. Whoever compares baselines tries each of a
candidate's scales on validation, and draws the next candidate as long as the time lasts that each baseline has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from dso.decisions.decision import Decision, DecisionSet
from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.steering.handle import Turnable


class BaselineError(UserError):
    """A baseline that has no place in this model, or cannot be made from these decisions; says which and why."""


class Attachable(Protocol):
    """A steering, or what acts like one: scale 0 is the base model."""

    def attach(self, model: nn.Module, scale: float = 1.0) -> Turnable:
        """Steer a model until the handle is detached."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a baseline is made from: the decisions of the training split, and what the base model says to them.

    Attributes:
        backbone: the frozen model, with nothing attached.
        decisions: N of them, ambiguous and unambiguous; all orders of a question are among them.
        base: (N, K) log-probabilities of the base model's policy; -inf where a decision has no such candidate.
        fair: (N, K) log-probabilities of the policy that is asked for: the base model's without the association on
            ambiguous decisions (:mod:`envs.association`), as it is on the others.
        target: (G,) the fair share of each of ``decisions.groups``.
        anchors: texts in which every token should stay as likely as it is; what learns is held to them.
        seed: of everything that is drawn.
        seconds: of wall clock that all candidates have together; what takes time should divide it up.
    """

    backbone: Backbone
    decisions: DecisionSet
    base: Tensor
    fair: Tensor
    target: tuple[float, ...]
    anchors: tuple[str, ...] = ()
    seed: int = 0
    seconds: float = 120.0


@dataclass(frozen=True)
class Candidate:
    """One setting of a baseline.

    Attributes:
        label: what was set, as a table shows it: ``layer 14``.
        steering: to attach.
    """

    label: str
    steering: Attachable


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A method.

    Attributes:
        name: by which it is asked for, such as ``caa``.
        title: what tables call it.
        source: the paper, with its section where the rule stands.
        propose: candidates, the most promising first. It raises BaselineError where it has no place.
        scales: that are tried on validation, ascending; a method without a strength has the scale 1 alone.
        facts: what a reader should know beside it, such as that it needs a second model.
    """

    name: str
    title: str
    source: str
    propose: Callable[[Task], Iterator[Candidate]]
    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    facts: dict[str, Any] = field(default_factory=dict)


class Rewritten:
    """A method that asks another question instead of changing the model, as a handle; scale 0 asks as it was.

    An :class:`~dso.evaluation.evaluator.Evaluator` hands each decision to :meth:`rewrite`, and all of them to
    :meth:`prepare` before.

    Args:
        rewritten: a decision -> the decision that is asked in its place, with the same candidates.
        prepared: works out, for many decisions together, what ``rewritten`` then finds.
    """

    def __init__(
        self,
        rewritten: Callable[[Decision], Decision],
        prepared: Callable[[Sequence[Decision]], None] | None = None,
    ):
        self._rewritten, self._prepared = rewritten, prepared
        self.scale: float | Tensor = 1.0

    def attach(self, model: nn.Module, scale: float = 1.0) -> Rewritten:
        """A handle of its own."""
        handle = Rewritten(self._rewritten, self._prepared)
        handle.scale = scale
        return handle

    def prepare(self, decisions: Sequence[Decision]) -> None:
        """Work out together what :meth:`rewrite` needs; the model has to be the base model."""
        if self._prepared is not None:
            self._prepared(decisions)

    def rewrite(self, decision: Decision) -> Decision:
        """The decision as it is asked at this scale."""
        return self._rewritten(decision) if self.scale else decision

    def detach(self) -> None:
        """Nothing is on the model."""
