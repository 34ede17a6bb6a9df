"""What steering may cost, held by dual ascent: KL on decisions, on the unambiguous ones among them and in anchor texts,
lost answer mass, and the order effect; and an L1 penalty, taken as a proximal step.

Budget. The Lagrangian of  max reward  subject to  E KL(pi_s || pi_0) <= eps  is  reward - beta * (KL - eps); beta
follows gradient ascent on its logarithm, ``log beta += lr * (KL / eps - 1)``, so that it stays positive and its step
does not depend on the unit of eps. A gradient that grew with beta would shake the operators by steps whose own KL is
beyond a small budget, which raises beta without end; so the Lagrangian is divided by max(1, beta) (Stooke, Achiam &
Abbeel 2020, Responsive safety in reinforcement learning by PID Lagrangian methods, divide by 1 + beta).

Answer mass. What all candidates hold together may fall short of what the base model gives them by a share of that at
most: reward - mu * (E max(0, base mass - mass) / E base mass - (1 - share)). What some prompts gain does not make up
for what others lose. mu may be 0, so its ascent is projected: ``mu = max(0, mu + lr * (lost share - (1 - share)))``.

Anchors and unambiguous decisions. The KL in neutral texts, and that of decisions which have a right answer, have a
budget and a beta of their own each, whose floor is what a nat costs while the budget is slack. The division is then by
the largest of 1, beta, and beta / max(1, its floor) of each of them, for the same reason.

Order. The mean order effect (:mod:`trainers.order`) may exceed the base model's in the same decisions by so much at
most; its dual variable is projected as mu is.

Sparsity. ``lambda * |x|_1`` by soft thresholding after the gradient step, ``x <- sign(x) max(|x| - rate lambda, 0)``:
what is reported as zero is exactly zero (Parikh & Boyd 2014, section 6.5.2). ``rate`` is the step size of each
coordinate, which under Adam is not the same for all (Yun, Lozano & Yang 2021, Adaptive proximal gradient methods):
with the learning rate alone, coordinates that hardly matter would not end at zero, as Adam steps as far along them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class RunningMean:
    """A mean that forgets: the first value as it is, later ones blended in.

    Args:
        averaging: weight of the past, from 0 to below 1.

    Attributes:
        value: None before the first.
    """

    def __init__(self, averaging: float):
        if not 0 <= averaging < 1:
            raise ValueError(f"averaging {averaging} must be in [0, 1)")
        self.averaging = averaging
        self.value: float | None = None

    def update(self, seen: float) -> float:
        """Take in a batch's value; returns the mean."""
        before = seen if self.value is None else self.value
        self.value = before + (1 - self.averaging) * (seen - before)
        return self.value


class FixedKL:
    """A KL penalty with a coefficient that never changes, as published; it holds no budget."""

    budget: float | None = None

    def __init__(self, coefficient: float):
        if not 0 <= coefficient < math.inf:
            raise ValueError(f"KL coefficient is {coefficient}, expected a finite number >= 0")
        self.coefficient = coefficient

    def update(self, kl: float) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


class KLBudget:
    """The dual variable of a KL budget.

    Args:
        budget: eps in nats; the mean KL on the answer positions may not exceed it.
        learning_rate: of the ascent on log beta, an optimiser step each.
        initial: beta at the start.
        margin: share of the budget that is aimed at, as training's KL varies from batch to batch.
        averaging: weight of the past in the running KL that the ascent sees.
        floor: least price; above 0 it makes training take the ways that cost little KL while the budget is slack.
    """

    CEILING = 1e4

    def __init__(
        self,
        budget: float,
        learning_rate: float = 0.1,
        initial: float = 0.1,
        margin: float = 0.9,
        averaging: float = 0.8,
        floor: float = 1e-4,
    ):
        if not 0 < budget < math.inf:
            raise ValueError(f"KL budget is {budget}, expected a finite number of nats > 0")
        if not 0 < initial < math.inf or not learning_rate >= 0:
            raise ValueError(f"initial price {initial} must be finite and > 0, learning rate {learning_rate} >= 0")
        if not 0 < margin <= 1 or not 0 < floor <= self.CEILING:
            raise ValueError(f"margin {margin} must be in (0, 1], floor {floor} > 0")
        self.budget = budget
        self.learning_rate = learning_rate
        self.margin = margin
        self.floor = floor
        self._log_beta = math.log(max(initial, floor))
        self._running = RunningMean(averaging)

    @property
    def coefficient(self) -> float:
        """beta, the price of one nat."""
        return math.exp(self._log_beta)

    def update(self, kl: float) -> None:
        """One step of dual ascent on a batch's mean KL."""
        before, running = self._running.value, self._running.update(kl)
        aim = self.margin * self.budget
        # The violation is bounded, or one bad batch would move beta by orders of magnitude.
        violation = min(max(running / aim - 1.0, -1.0), 1.0)
        if violation > 0 and self.coefficient > 1 and before is not None and before > running:
            # Beyond 1 a higher price does not make KL fall faster; where it falls fast enough, what is added to the
            # price meanwhile would only have to come off again, with the bias back by then.
            steps_left = math.log(running / aim) / math.log(before / running)
            if steps_left * self.learning_rate < 3:
                return
        low, high = math.log(self.floor), math.log(self.CEILING)
        self._log_beta = min(max(self._log_beta + self.learning_rate * violation, low), high)

    def state_dict(self) -> dict[str, Any]:
        return {"log_beta": self._log_beta, "running": self._running.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_beta, self._running.value = state["log_beta"], state["running"]


class ProjectedDual:
    """A dual variable that is 0 as long as its limit is slack.

    Args:
        learning_rate: of the ascent, an optimiser step each.
        averaging: weight of the past in the running means that the ascent sees.

    Attributes:
        coefficient: the variable.
    """

    CEILING = 10.0

    def __init__(self, learning_rate: float, averaging: float):
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning rate {learning_rate} must be finite and > 0")
        self.learning_rate = learning_rate
        self.coefficient = 0.0
        self._seen, self._base = RunningMean(averaging), RunningMean(averaging)

    def _ascend(self, violation: float) -> None:
        self.coefficient = min(max(self.coefficient + self.learning_rate * violation, 0.0), self.CEILING)

    def state_dict(self) -> dict[str, float | list[float] | None]:
        seen, base = self._seen.value, self._base.value
        known = None if seen is None or base is None else [seen, base]
        return {"coefficient": self.coefficient, "running": known}

    def load_state_dict(self, state: dict) -> None:
        self.coefficient = state["coefficient"]
        self._seen.value, self._base.value = state["running"] or (None, None)


class AnswerMassFloor(ProjectedDual):
    """The dual variable of a floor under the answer mass.

    Args:
        share: of the base model's mean answer mass that is to be left where prompts lose some.
        learning_rate, averaging: of :class:`ProjectedDual`.
    """

    def __init__(self, share: float, learning_rate: float = 0.1, averaging: float = 0.8):
        super().__init__(learning_rate, averaging)
        if not 0 < share <= 1:
            raise ValueError(f"share {share} must be in (0, 1]")
        self.share = share

    @property
    def price(self) -> float:
        """What a unit of mean answer mass costs that is lost: mu over the base model's running mass."""
        return self.coefficient / self._base.value if self.coefficient and self._base.value else 0.0

    def update(self, lost: float, base: float) -> None:
        """One step of dual ascent.

        Args:
            lost: a batch's mean of the answer mass that is less than the base model's.
            base: the mean answer mass of the base model in that batch.
        """
        lost, base = self._seen.update(lost), self._base.update(base)
        if base > 0:  # a base model that gives candidates nothing asks for nothing
            self._ascend(lost / base - (1 - self.share))


class OrderLimit(ProjectedDual):
    """The dual variable of a limit on the order effect.

    Args:
        increase: over the base model's order effect that is allowed.
        learning_rate, averaging: of :class:`ProjectedDual`.
    """

    def __init__(self, increase: float, learning_rate: float = 1.0, averaging: float = 0.8):
        super().__init__(learning_rate, averaging)
        if not 0 <= increase < math.inf:
            raise ValueError(f"increase {increase} must be finite and >= 0")
        self.increase = increase

    def update(self, effect: float, base: float) -> None:
        """One step of dual ascent on a batch's mean order effect, and the base model's in the same decisions."""
        self._ascend(self._seen.update(effect) - self._base.update(base) - self.increase)


@dataclass(frozen=True, slots=True)
class Prices:
    """What the Lagrangian of a step charges.

    Attributes:
        kl: of one nat on decisions.
        mass: of the mean answer mass that is less than the base model's.
        anchors: of one nat in anchor texts.
        order: of the mean order effect.
        unambiguous: of one nat on unambiguous decisions, beside what ``kl`` charges.
        unit: what the whole Lagrangian, reward, prices and L1 penalty, is divided by.
    """

    kl: float
    mass: float = 0.0
    anchors: float = 0.0
    order: float = 0.0
    unambiguous: float = 0.0
    unit: float = 1.0


class Constraints:
    """The limits of a training with their dual variables.

    Args:
        kl: on decisions.
        mass_floor: under their answer mass; None for none.
        anchors: on anchor texts; None where they are not looked at.
        order: on the order effect; None for none.
        unambiguous: on the unambiguous decisions alone; None for none.
    """

    def __init__(
        self,
        kl: KLBudget | FixedKL,
        mass_floor: AnswerMassFloor | None = None,
        anchors: KLBudget | FixedKL | None = None,
        order: OrderLimit | None = None,
        unambiguous: KLBudget | None = None,
    ):
        self.kl = kl
        self.mass_floor = mass_floor
        self.anchors = anchors
        self.order = order
        self.unambiguous = unambiguous

    @property
    def _held(self) -> dict[str, KLBudget | FixedKL | AnswerMassFloor | OrderLimit]:
        limits = {
            "kl": self.kl,
            "mass": self.mass_floor,
            "anchor": self.anchors,
            "order": self.order,
            "unambiguous": self.unambiguous,
        }
        return {name: limit for name, limit in limits.items() if limit is not None}

    def require_seen(self, anchors: int, unambiguous: int) -> None:
        """Refuse a limit on what steps do not look at.

        Args:
            anchors, unambiguous: anchor texts and unambiguous decisions of a step.

        Raises:
            ValueError: naming it.
        """
        if self.anchors is not None and not anchors:
            raise ValueError("there is a limit on anchor texts and none of them in a step, or in the task")
        if self.unambiguous is not None and not unambiguous:
            raise ValueError("there is a limit on unambiguous decisions and none of them in a step")

    def prices(self) -> Prices:
        """As the dual variables are now."""
        return Prices(
            kl=self.kl.coefficient,
            mass=0.0 if self.mass_floor is None else self.mass_floor.price,
            anchors=_coefficient(self.anchors),
            order=_coefficient(self.order),
            unambiguous=_coefficient(self.unambiguous),
            unit=max(1.0, self.kl.coefficient, _raised(self.anchors), _raised(self.unambiguous)),
        )

    def update(self, measured: Mapping[str, float]) -> None:
        """One step of dual ascent each, on what a step measured (:class:`trainers.update.Updater`)."""
        self.kl.update(measured["kl"])
        if self.mass_floor is not None:
            self.mass_floor.update(measured["lost_answer_mass"], measured["base_answer_mass"])
        if self.anchors is not None:
            self.anchors.update(measured["anchor_kl"])
        if self.order is not None:
            self.order.update(measured["order_effect"], measured["base_order_effect"])
        if self.unambiguous is not None and "unambiguous_kl" in measured:  # a minibatch of PPO may have none
            self.unambiguous.update(measured["unambiguous_kl"])

    def coefficients(self) -> dict[str, float]:
        """The dual variables, by the names under which they are recorded."""
        return {f"{name}_coefficient": limit.coefficient for name, limit in self._held.items()}

    def state_dict(self) -> dict[str, Any]:
        return {name: limit.state_dict() for name, limit in self._held.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, limit in self._held.items():
            limit.load_state_dict(state[name])


def _coefficient(limit: KLBudget | FixedKL | OrderLimit | None) -> float:
    return 0.0 if limit is None else limit.coefficient


def _raised(limit: KLBudget | FixedKL | None) -> float:
    """How much dearer a nat is than at its floor."""
    return limit.coefficient / max(1.0, limit.floor) if isinstance(limit, KLBudget) else 1.0


@torch.no_grad()
def soft_threshold(parameters: Iterable[Tensor], amount: Tensor | float) -> None:
    """Move every coefficient towards zero by ``amount``, and no further than zero, in place."""
    for parameter in parameters:
        parameter.copy_(parameter.sign() * (parameter.abs() - amount).clamp(min=0))


def step_sizes(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor | float]]:
    """Each parameter with what its last step multiplied the (averaged) gradient by: per coordinate if by Adam."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                yield parameter, group["lr"]
                continue
            second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
            yield parameter, group["lr"] / (second.sqrt() + group["eps"])


def sparsity(parameters: Iterable[Tensor]) -> float:
    """Share of coefficients that are exactly zero."""
    values = list(parameters)
    zeros = sum((p == 0).sum() for p in values)  # stays on the device until all are counted
    return int(zeros) / max(sum(p.numel() for p in values), 1)
