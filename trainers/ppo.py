"""SteeringPPO: Stable-Baselines3's PPO over a steered model, with three policy-gradient estimators.

Each rollout is one batch of one-step episodes. With pi the policy over the K candidates, r their rewards, v a baseline:

    expected     sum_k pi_k r_k                                      exact: no sampling variance
    reinforce    log pi(k) (r_k - v),  k ~ pi                        DSO (arXiv 2512.15926, section 3)
    ppo          min(q A, clip(q, 1 -+ eps) A), q = pi(k) / pi_old(k), A = r_k - v     Schulman et al. 2017

The first two act and learn in one forward pass, whose graph is kept from the rollout; ``ppo`` rolls out first, like
the base class. Same rewards, same constraints, same optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from dso.errors import UserError
from dso.rewards import expected_reward
from dso.scoring import kl_divergence
from envs.sampler import BlockSampler
from envs.task import DecisionTask
from trainers.constraints import FixedKL, KLBudget, soft_threshold, sparsity, step_sizes
from trainers.fisher import fisher_diagonal, whitened_step, whitening
from trainers.policy import Outcome, SteeringPolicy, choose
from trainers.vec import DecisionVecEnv

ESTIMATORS = ("expected", "reinforce", "ppo")
# What PPO takes and this step does not use: refused, as a setting that is silently ignored misleads.
UNUSED = {
    "n_steps": 1,
    "normalize_advantage": False,
    "ent_coef": 0.0,
    "clip_range_vf": None,
    "target_kl": None,
    "use_sde": False,
}


class TrainingDiverged(UserError):
    """Training that cannot go on, as its numbers are no longer finite."""


class SteeringPPO(PPO):
    """Learn a steering.

    Args:
        env: a :class:`trainers.vec.DecisionVecEnv`.
        policy_kwargs: of :class:`trainers.policy.SteeringPolicy`: ``steering``, ``baseline``, ``length_normalised``;
            the task is the environment's.
        estimator: ``expected``, ``reinforce`` or ``ppo``.
        kl: the constraint, a :class:`trainers.constraints.KLBudget` or :class:`FixedKL`.
        unambiguous_weight: weight of the unambiguous decisions' mean reward beside the ambiguous ones'.
        sparsity: lambda of the L1 penalty on the operators, beside a reward of at most 1.
        anchors: anchor texts of the task whose KL counts in each step.
        hard_preference: let the reward see sampled answers, not probabilities (as published; not with ``expected``).
        kwargs: what PPO takes but for those in ``UNUSED``; ``batch_size`` is the whole batch unless given.

    Raises:
        ValueError: on an unknown estimator, or a setting that would have no effect.
    """

    policy: SteeringPolicy

    def __init__(
        self,
        env: DecisionVecEnv,
        *,
        policy_kwargs: dict[str, Any],
        estimator: str = "expected",
        kl: KLBudget | FixedKL | None = None,
        unambiguous_weight: float = 1.0,
        sparsity: float = 0.0,
        anchors: int = 0,
        hard_preference: bool = False,
        **kwargs: Any,
    ):
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
        if estimator == "expected" and hard_preference:
            raise ValueError("estimator 'expected' samples no answers to take a preference from; use reinforce or ppo")
        if unused := [name for name, value in UNUSED.items() if kwargs.get(name, value) != value]:
            raise ValueError(f"{unused[0]} is {kwargs[unused[0]]!r}, but SteeringPPO does not use it; leave it away")
        self.estimator = estimator
        self.kl = kl or KLBudget(0.1)
        self.unambiguous_weight = unambiguous_weight
        self.sparsity = sparsity
        self.anchors = min(anchors, len(env.inner.task.anchors))
        self.hard_preference = hard_preference
        self.stop_requested = False  # set by whoever wants training to end before the next step
        self.measured: dict[str, float] = {}  # what the last optimiser step recorded
        self._handles = np.zeros(0, dtype=np.int64)
        self._rollout: tuple[Outcome, Tensor, Tensor] | None = None
        self._due: int | None = None
        task = env.inner.task
        policy_kwargs = {"task": task, **policy_kwargs}
        defaults: dict[str, Any] = {**UNUSED, "batch_size": env.num_envs, "device": task.backbone.device}
        super().__init__(SteeringPolicy, env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})

    @property
    def task(self) -> DecisionTask:
        """Decisions, backbone and rewards."""
        return self.policy.task

    @property
    def steps_done(self) -> int:
        """Batches that were decided and learned from."""
        return self.num_timesteps // self.env.num_envs

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Decide one batch; where acting and learning share a pass, its graph is kept for :meth:`train`."""
        if self.stop_requested:
            return False
        shared = self.estimator != "ppo"
        rollout_buffer.reset()
        callback.on_rollout_start()
        handles, starts = self._last_obs, self._last_episode_starts
        with torch.set_grad_enabled(shared):
            outcome = self.policy.decide(handles, next_token=shared)
        if outcome.log_policy.isnan().any():
            raise TrainingDiverged(f"step {self.steps_done + 1}: the policy is not finite; lower the learning rate")
        chosen = choose(outcome.log_policy)
        stated = outcome.log_policy.detach().exp()
        if self.hard_preference:
            stated = torch.nn.functional.one_hot(chosen, stated.shape[1]).to(stated.dtype)
        table = env.state_policy(stated)
        actions = chosen.cpu().numpy()
        new_obs, rewards, dones, infos = env.step(actions)
        self.num_timesteps += env.num_envs
        self._last_obs, self._last_episode_starts = new_obs, dones  # the batch is over, whatever a callback says
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        self._update_info_buffer(infos, dones)
        log_probs = outcome.log_policy.detach().gather(1, chosen[:, None])[:, 0]
        values = outcome.values.detach()
        rollout_buffer.add(handles, actions.reshape(-1, 1), rewards, starts, values, log_probs)
        rollout_buffer.compute_returns_and_advantage(last_values=torch.zeros_like(values), dones=dones)
        self.policy.update_baseline(handles, (stated * table).sum(-1))
        self._rollout = (outcome, table, chosen) if shared else None
        self._handles = handles
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def dump_logs(self, iteration: int = 0) -> None:
        """Put off to the end of :meth:`train`, as the base class logs a step before it is learned from."""
        self._due = iteration

    def train(self) -> None:
        """One optimiser step on the kept pass, or PPO's epochs over the rollout buffer."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if self.estimator == "ppo":
            for _ in range(self.n_epochs):
                for batch in self.rollout_buffer.get(self.batch_size):
                    handles = batch.observations.long().view(-1).cpu().numpy()
                    outcome = self.policy.decide(handles, next_token=True)
                    chosen = outcome.log_policy.gather(1, batch.actions.long().view(-1, 1))[:, 0]
                    gain = self._clipped(chosen, batch.old_log_prob, batch.advantages)
                    self._learn(handles, outcome, gain, batch.returns)
        else:
            outcome, table, actions = self._rollout
            self._rollout = None  # the graph is used once
            if self.estimator == "expected":
                gain = expected_reward(outcome.log_policy.masked_fill(outcome.log_policy.isneginf(), -1e9), table)
                returns = gain.detach()
            else:
                returns = table.gather(1, actions[:, None])[:, 0]
                gain = outcome.log_policy.gather(1, actions[:, None])[:, 0] * (returns - outcome.values.detach())
            self._learn(self._handles, outcome, gain, returns)
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if self._due is not None:
            super().dump_logs(self._due)
            self._due = None

    def _clipped(self, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Tensor:
        ratio = (log_prob - old_log_prob).exp()
        clip = self.clip_range(self._current_progress_remaining)
        self.logger.record("train/clip_fraction", float(((ratio - 1).abs() > clip).float().mean()))
        return torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)

    def _learn(self, handles: np.ndarray, outcome: Outcome, gain: Tensor, returns: Tensor) -> None:
        """One step up the weighted gain under the constraints.

        Args:
            gain: (N,) surrogate reward of each decision, with gradient.
            returns: (N,) rewards, for the value head.
        """
        ambiguous = self.task.answers[torch.as_tensor(handles, device=gain.device)] < 0
        objective = _mean(gain, ambiguous) + self.unambiguous_weight * _mean(gain, ~ambiguous)
        divergence = self._divergence(handles, outcome).mean()
        loss = -objective + self.kl.coefficient * divergence
        if outcome.values.requires_grad:
            loss = loss + self.vf_coef * torch.nn.functional.mse_loss(outcome.values, returns)
        optimizer = self.policy.optimizer
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        if not torch.isfinite(norm):
            raise TrainingDiverged(f"step {self.steps_done}: the gradient is not finite; lower the learning rate")
        whitened_step(optimizer, list(self.policy.steering.parameters()), self.policy.step_sizes())
        if self.sparsity:
            self._shrink()
        kl = float(divergence.detach())
        self._record(objective, loss, kl, norm, outcome)
        self.kl.update(kl)

    def whiten(self, batches: int, damping: float = 0.03) -> None:
        """Measure steps in KL from here on (:mod:`trainers.fisher`), by a few batches of the training decisions.

        Args:
            batches: draws of the estimate, each one forward and backward pass over a batch.
            damping: lower bound of a coordinate's share of the mean Fisher information.
        """
        inner = self.env.inner
        sampler = BlockSampler(self.task.decisions, *inner.sampler.counts, seed=self.seed or 0)

        def log_probs() -> Iterator[Tensor]:
            for _ in range(batches):
                yield self.policy.decide(sampler.draw(), next_token=True).next_token

        parameters = list(self.policy.steering.parameters())
        self.policy.set_step_sizes(whitening(fisher_diagonal(log_probs, parameters), damping))

    def _shrink(self) -> None:
        """The proximal step of the L1 penalty, on the operators only."""
        sizes = {id(p): d for p, d in zip(self.policy.steering.parameters(), self.policy.step_sizes(), strict=True)}
        for parameter, rate in step_sizes(self.policy.optimizer):
            if id(parameter) in sizes:
                soft_threshold([parameter], rate * sizes[id(parameter)].square() * self.sparsity)

    def _divergence(self, handles: np.ndarray, outcome: Outcome) -> Tensor:
        """KL to the base model at the answer positions, and at the end of anchor texts drawn for this step."""
        divergence = kl_divergence(outcome.next_token, self.task.reference(handles))
        if not self.anchors:
            return divergence
        drawn = [self.task.anchors[i] for i in torch.randperm(len(self.task.anchors))[: self.anchors]]
        anchored = kl_divergence(self.task.backbone.next_token(drawn), self.task.anchor_reference(drawn))
        return torch.cat([divergence, anchored])

    def _record(self, objective: Tensor, loss: Tensor, kl: float, norm: Tensor, outcome: Outcome) -> None:
        self.measured = {
            "objective": float(objective.detach()),
            "loss": float(loss.detach()),
            "kl": kl,
            "kl_coefficient": self.kl.coefficient,
            "gradient_norm": float(norm),
            "running_bias": float((self.task.preference - self.task.target).abs().sum(-1).mean()),
            "answer_mass": float(outcome.answer_mass.mean()),
            "sparsity": sparsity(self.policy.steering.parameters()),
        }
        for name, value in self.measured.items():
            self.logger.record(f"train/{name}", value)

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not to be had: an archive holds no backbone, so there is nothing to build the policy from."""
        raise TypeError(
            "build SteeringPPO as for training, then call set_parameters(path), or trainers.state.load_state"
        )

    def _excluded_save_params(self) -> list[str]:
        """The backbone and everything that holds it stay out of SB3's own archives."""
        return [*super()._excluded_save_params(), "_rollout", "_handles", "policy_kwargs", "kl"]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over the marked decisions, 0 if there are none."""
    return (values * where).sum() / where.sum().clamp(min=1)
