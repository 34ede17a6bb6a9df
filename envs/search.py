"""SteeringSearchEnv: a steering's coefficients as the action, for models without gradients."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from dso.decisions.decision import DecisionSet
from dso.decisions.sampler import BlockSampler
from dso.models.backbone import Backbone
from dso.rewards import group_preference
from dso.steering.handle import Handle
from dso.steering.model import Steering
from envs.basis import group_basis, random_basis
from envs.spec import SharedSpec
from envs.task import DecisionTask

__all__ = ["Found", "SteeringSearchEnv", "group_basis", "random_basis"]


@dataclass(frozen=True, slots=True)
class Found:
    """Coefficients (m,), and how much more they earned than the starting state on the same minibatch."""

    coefficients: np.ndarray
    gain: float


class SteeringSearchEnv(SharedSpec, gym.Env[np.ndarray, np.ndarray]):
    """Find a steering without gradients: propose coefficients, and be paid for how fair the steered model is.

    ## Description
    A steering has many coefficients; a basis (:func:`envs.basis.random_basis`, :func:`envs.basis.group_basis`) names
    m directions among them. A step takes a proposal z, sets the steering to ``x_0 + radius * sum_j z_j basis_j`` and
    runs the steered model on the episode's minibatch of decisions, in which name and position effects cancel
    (:class:`dso.decisions.sampler.BlockSampler`). It needs forward passes only.

    ## Action Space
    ``Box(-1, 1, (m,), float32)``: z itself, not a change of it; values outside are clipped.

    ## Observation Space
    ``Box(-1, 1, (m + G + 3,), float32)`` about the last proposal: z; for each group, the mean over contexts of
    p_g(c) - t_g;
    half the bias; KL / (KL + KL budget); the mean probability of the right answer on unambiguous decisions (0 if the
    minibatch has none).

    ## Rewards
    ``-bias - kl_weight * max(0, KL - kl_budget) + accuracy_weight * correctness``, where bias is the mean over the
    minibatch's contexts of sum_g |p_g(c) - t_g|, KL the mean KL(pi_s || pi_0) in nats of the next-token distribution
    at the answer positions, and correctness as observed. The info has each of them, as ``bias``, ``kl`` and
    ``correctness``.

    ## Starting State
    z = 0, measured on a fresh minibatch, which the whole episode keeps so that its steps can be compared. A seed also
    starts the minibatches anew.

    ## Episode End
    Truncated after ``horizon`` steps, never terminated.

    Args:
        backbone: the model.
        decisions: minibatches are drawn from these.
        steering: its coefficients are searched, from x_0, the ones it has now. It holds the last proposal until
            :meth:`apply_best`.
        basis: key of the steering's tensors -> (m, ...).
        handle: of the steering, if it is attached already, at the scale to search at. None attaches it at scale 1 just
            while the environment measures, so several environments can share a model.
        target: fair share of each group; uniform when None.
        ambiguous, unambiguous: decisions of each kind in a minibatch. The fewer units a context has in it, the more
            of the bias is noise.
        horizon: steps in an episode.
        radius: the distance that 1 in z stands for.
        kl_budget, kl_weight: nats that are free, and the price of each nat above them.
        accuracy_weight: of the correctness.
        seed: of the minibatches; None draws one at random.

    Attributes:
        best: the coefficients with the largest gain inside the KL budget so far, at first those of x_0. The gain comes
            from one minibatch and flatters: measure the result on other decisions.

    Raises:
        ValueError: on an option outside its range, or a basis that does not fit the steering.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        backbone: Backbone,
        decisions: DecisionSet,
        steering: Steering,
        basis: Mapping[str, Tensor],
        *,
        handle: Handle | None = None,
        target: dict[str, float] | None = None,
        ambiguous: int = 48,
        unambiguous: int = 0,
        horizon: int = 8,
        radius: float = 1.0,
        kl_budget: float = 0.1,
        kl_weight: float = 2.0,
        accuracy_weight: float = 0.5,
        seed: int | None = None,
    ):
        if ambiguous < 1 or horizon < 1 or radius <= 0 or kl_budget <= 0 or kl_weight < 0:
            raise ValueError(
                "expected ambiguous and horizon >= 1, radius and kl_budget > 0, kl_weight >= 0; found "
                f"ambiguous={ambiguous}, horizon={horizon}, {radius=}, {kl_budget=}, {kl_weight=}"
            )
        m = self._m = _directions(basis, steering)
        self.task = DecisionTask(backbone, decisions, target, handle=handle)
        self.steering = steering
        self.sampler = BlockSampler(decisions, ambiguous, unambiguous, seed)
        self.horizon, self.radius = horizon, radius
        self.kl_budget, self.kl_weight, self.accuracy_weight = kl_budget, kl_weight, accuracy_weight
        self._origin = {key: value.detach().clone() for key, value in steering.tensors().items()}
        self._basis = {key: value.detach().to(self._origin[key]) for key, value in basis.items()}
        self.best = Found(np.zeros(m, np.float32), 0.0)
        self.action_space = spaces.Box(-1.0, 1.0, (m,), np.float32)
        self.observation_space = spaces.Box(-1.0, 1.0, (m + len(decisions.groups) + 3,), np.float32)
        self._indices = np.zeros(0, np.int64)
        self._steps = 0
        self._start = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Measure x_0 on a fresh minibatch; with a seed, on the first of that seed."""
        super().reset(seed=seed)
        if seed is not None:
            self.sampler.seed(seed)
        self._indices, self._steps = self.sampler.draw(), 0
        observation, self._start, info = self._measure(np.zeros(self._m, np.float32))
        return observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Measure a proposal on the episode's minibatch."""
        if not len(self._indices):
            raise gym.error.ResetNeeded("there is no minibatch yet: call reset() before step()")
        proposal = np.asarray(action, np.float32)
        if proposal.shape != (self._m,) or not np.isfinite(proposal).all():
            raise ValueError(f"action is {action}, expected {self._m} finite numbers")
        proposal = proposal.clip(-1.0, 1.0)
        observation, reward, info = self._measure(proposal)
        if info["kl"] <= self.kl_budget and reward - self._start > self.best.gain:
            self.best = Found(proposal, reward - self._start)
        self._steps += 1
        return observation, reward, False, self._steps >= self.horizon, info

    def apply_best(self) -> None:
        """Set the steering to the best coefficients so far."""
        self.set_coefficients(self.best.coefficients)

    def set_coefficients(self, coefficients: np.ndarray) -> None:
        """Set the steering to ``x_0 + radius * sum_j z_j basis_j`` for z of shape (m,)."""
        z = torch.as_tensor(np.asarray(coefficients, np.float32)) * self.radius
        moved = {key: torch.tensordot(z.to(part), part, dims=1) for key, part in self._basis.items()}
        self.steering.load_tensors({key: value + moved.get(key, 0.0) for key, value in self._origin.items()})

    def _steered(self) -> AbstractContextManager:
        return nullcontext() if self.task.handle is not None else self.steering.on(self.task.backbone.model)

    @torch.no_grad()
    def _measure(self, coefficients: np.ndarray) -> tuple[np.ndarray, float, dict[str, float]]:
        """Observation, reward and info of a proposal on the episode's minibatch."""
        task = self.task
        reference = task.reference(self._indices)
        self.set_coefficients(coefficients)
        with self._steered():
            scores = task.backbone.score(task.pick(self._indices), next_token=True)
        kl = float(scores.kl(reference).mean())
        policy = scores.policy().exp()
        index = torch.as_tensor(self._indices, device=task.groups.device)
        groups, contexts, answers = task.groups[index][:, : policy.shape[1]], task.contexts[index], task.answers[index]
        free = answers < 0
        preference, mass = group_preference(policy[free], groups[free], contexts[free], task.n_contexts, task.target)
        deviation = (preference - task.target)[mass > 0]
        bias = float(deviation.abs().sum(-1).mean())
        info = {"bias": bias, "kl": kl}
        if not bool(free.all()):
            info["correctness"] = float(policy[~free].gather(1, answers[~free][:, None]).mean())
        correctness = info.get("correctness", 0.0)
        reward = -bias - self.kl_weight * max(0.0, kl - self.kl_budget) + self.accuracy_weight * correctness
        rest = [bias / 2, kl / (kl + self.kl_budget), correctness]
        observation = np.concatenate([coefficients, deviation.mean(0).cpu().numpy(), rest]).astype(np.float32)
        return observation.clip(-1.0, 1.0), reward, info


def _directions(basis: Mapping[str, Tensor], steering: Steering) -> int:
    """m, after checking that the basis is one of the steering."""
    tensors = steering.tensors()
    counts = {value.shape[0] for value in basis.values() if value.ndim}
    if len(counts) != 1:
        raise ValueError(f"the basis has parts of {sorted(counts)} directions, expected the same number in all")
    (m,) = counts
    for key, value in basis.items():
        if key not in tensors or value.shape != (m, *tensors[key].shape) or m < 1:
            wanted = f"({m}, {', '.join(map(str, tensors[key].shape))})" if key in tensors else "no such key"
            raise ValueError(f"the basis has {key!r} of shape {tuple(value.shape)}, the steering has {wanted}")
    return m
