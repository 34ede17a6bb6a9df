"""SteeringPPO: Stable-Baselines3's PPO over a steered model, with four estimators of what to learn.

Each rollout is one batch of one-step episodes. ``regression``, ``expected`` and ``reinforce`` (:mod:`trainers.lesson`)
act and learn in one forward pass, whose graph is kept from the rollout; ``ppo``, and each of them in more parts than
one, rolls out first, like the base class. Same rewards, same constraints, same optimiser step (:mod:`trainers.update`).

Several processes (:mod:`trainers.parallel.ranks`) all draw the same batch; each passes its own share of it through the
model and learns of the others' answers. Rollouts, rewards, baselines and the price of KL are therefore the same in all
of them, and in one process; what is divided are the passes, and what is added up are gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from dso.decisions.sampler import BlockSampler
from dso.errors import UserError
from dso.steering.model import Steering
from envs.task import DecisionTask
from trainers.constraints import Constraints, KLBudget, sparsity
from trainers.fisher import whitening
from trainers.learner import Learner
from trainers.lesson import EXACT, Lesson, require_usable
from trainers.order import Decided
from trainers.parallel.ranks import World
from trainers.policy import SteeringPolicy, choose
from trainers.state.generators import random_state, restore_random
from trainers.state.saved import require_same_shapes
from trainers.trainer import Contents
from trainers.update import Passed, Updater
from trainers.vec import DecisionVecEnv

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
    """Training that cannot go on, as its numbers are no longer finite; raised in all processes alike."""


class SteeringPPO(PPO):
    """Learn a steering.

    Args:
        env: a :class:`trainers.vec.DecisionVecEnv`.
        policy_kwargs: of :class:`trainers.policy.SteeringPolicy`: ``steering``, ``baseline``;
            the task is the environment's.
        estimator: ``regression``, ``expected``, ``reinforce`` or ``ppo``.
        constraints: what it may cost; a KL budget of 0.1 unless given. The order effect is held by ``expected`` and
            ``reinforce``: ``regression`` learns towards the base model's, and ``ppo``'s minibatches part questions.
        unambiguous_weight: weight of the unambiguous decisions' mean reward beside the ambiguous ones'.
        sparsity: lambda of the L1 penalty on the operators, beside a reward of at most 1.
        anchors: anchor texts of the task whose KL counts in each step, at the price of their constraint.
        hard_preference: let the reward see sampled answers, not probabilities (as published; ``reinforce``, ``ppo``).
        accumulation: parts that each process learns its share of a step in, one after the other.
        max_skipped: steps in a row that may be skipped as their numbers are not finite.
        world, deepspeed: the processes, and DeepSpeed's configuration where there are several.
        kwargs: what PPO takes but for those in ``UNUSED``; ``batch_size`` is the whole batch unless given.

    Raises:
        ValueError: on an unknown estimator, a setting or limit without an effect, or fewer decisions than parts.
    """

    env: DecisionVecEnv
    policy: SteeringPolicy
    clip_range: Callable[[float], float]
    _last_obs: np.ndarray
    _last_episode_starts: np.ndarray

    def __init__(
        self,
        env: DecisionVecEnv,
        *,
        policy_kwargs: dict[str, Any],
        estimator: str = "expected",
        constraints: Constraints | None = None,
        unambiguous_weight: float = 1.0,
        sparsity: float = 0.0,
        anchors: int = 0,
        hard_preference: bool = False,
        accumulation: int = 1,
        max_skipped: int = 5,
        world: World | None = None,
        deepspeed: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.constraints = constraints or Constraints(KLBudget(0.1))
        require_usable(
            estimator,
            hard_preference=hard_preference,
            pooling=env.inner.task.reward.pooling,
            holds_order=self.constraints.order is not None,
        )
        if unused := [name for name, value in UNUSED.items() if kwargs.get(name, value) != value]:
            raise ValueError(f"{unused[0]} is {kwargs[unused[0]]!r}, but SteeringPPO does not use it; leave it away")
        self.estimator = estimator
        self.kl = self.constraints.kl
        self.anchors = 0 if self.constraints.anchors is None else min(anchors, len(env.inner.task.anchors))
        self.constraints.require_seen(anchors=self.anchors, unambiguous=env.inner.sampler.counts[1])
        self.hard_preference = hard_preference
        self.max_skipped = max_skipped
        self.world = world or World()
        self.skipped_steps = self.skipped_in_a_row = 0
        self.stop_requested = False  # set by whoever wants training to end before the next step
        self.measured: dict[str, float] = {}  # what the last optimiser step recorded
        self._lesson: Lesson | None = None
        self._kept: Passed | None = None
        self._due: int | None = None
        task = env.inner.task
        policy_kwargs = {"task": task, **policy_kwargs}
        defaults: dict[str, Any] = {**UNUSED, "batch_size": env.num_envs, "device": task.backbone.device}
        super().__init__(SteeringPolicy, env, policy_kwargs=policy_kwargs, **{**defaults, **kwargs})
        fewest = env.num_envs % self.batch_size or self.batch_size if estimator == "ppo" else env.num_envs
        if fewest < self.world.size * accumulation:
            shares = f"{self.world.size} processes x {accumulation} parts"
            raise ValueError(f"a step of {fewest} decisions cannot be divided among {shares}")
        self.sparsity = sparsity
        self.policy.optimizer.param_groups[0]["penalty"] = sparsity
        self.learner = self._make_learner(accumulation, deepspeed)
        self.updater = Updater(
            self.policy,
            self.learner,
            estimator=estimator,
            unambiguous_weight=unambiguous_weight,
            value_weight=self.vf_coef,
            anchors=self.anchors,
        )

    def _make_learner(self, parts: int, deepspeed: dict[str, Any] | None) -> Learner:
        if deepspeed is None:
            return Learner(self.policy, self.max_grad_norm, parts)
        from trainers.parallel.engine import EngineLearner  # nothing of it is imported in one process

        return EngineLearner(self.policy, self.max_grad_norm, parts, self.world, deepspeed)

    @property
    def task(self) -> DecisionTask:
        """Decisions, backbone and rewards."""
        return self.policy.task

    @property
    def steering(self) -> Steering:
        """What is learned."""
        return self.policy.steering

    @property
    def decisions_a_step(self) -> int:
        """Decisions of a batch."""
        return self.env.num_envs

    @property
    def steps_done(self) -> int:
        """Batches that were decided and learned from, or skipped."""
        return self.num_timesteps // self.env.num_envs

    def learn_until(self, steps: int, callback: BaseCallback) -> None:
        """See :meth:`trainers.trainer.SteeringTrainer.learn_until`."""
        left = max(0, steps * self.env.num_envs - self.num_timesteps)
        self.learn(left, callback, log_interval=1, reset_num_timesteps=False)

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        found = super()._setup_learn(*args, **kwargs)
        self.learner.pass_through(self._start)  # here, where all processes are
        return found

    def _start(self) -> None:
        self.task.start()
        if self.estimator == "regression":
            self.task.start_wanted()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """Decide one batch; where acting and learning share a pass, its graph is kept for :meth:`train`."""
        if self.world.agree(self.stop_requested):  # a signal heard while it waits stands for the next batch
            self.stop_requested = True
            return False
        rollout_buffer.reset()
        callback.on_rollout_start()
        indices, starts = self._last_obs, self._last_episode_starts
        anchors = self.updater.draw_anchors()
        log_policy, values = self._decide(indices, anchors)
        if log_policy.isnan().any():
            return self._pass_over(callback)
        chosen = choose(log_policy)
        stated = self.task.pool(log_policy.exp(), indices)
        if self.hard_preference:
            stated = torch.nn.functional.one_hot(chosen, stated.shape[1]).to(stated.dtype)
        table = self.learner.pass_through(lambda: self.env.state_policy(stated))  # which may ask the base model
        actions = chosen.cpu().numpy()
        self.env.step_async(actions)
        new_obs, rewards, dones, infos = self.env.step_wait()
        self.num_timesteps += env.num_envs
        self._last_obs, self._last_episode_starts = new_obs, dones  # the batch is over, whatever a callback says
        callback.update_locals(locals())
        if not callback.on_step():
            return False
        self._update_info_buffer(infos, dones)
        log_probs = log_policy.gather(1, chosen[:, None])[:, 0]
        rollout_buffer.add(indices, actions.reshape(-1, 1), rewards, starts, values, log_probs)
        rollout_buffer.compute_returns_and_advantage(last_values=torch.zeros_like(values), dones=dones)
        expected = (stated * table).sum(-1)
        self.policy.update_baseline(indices, expected)
        returns = expected if self.estimator in EXACT else table.gather(1, chosen[:, None])[:, 0]
        ambiguous = self.task.ambiguous(indices)
        pooled = None if self.task.reward.pooling == "linear" else stated
        wanted = self.task.wanted(indices, log_policy) if self.estimator == "regression" else None
        told = returns, returns - values, log_probs, anchors, table, pooled, wanted
        self._lesson = Lesson(indices, ambiguous, chosen, *told)
        if self.constraints.order is not None:
            base = self.learner.pass_through(lambda: self.task.base_policy(indices))
            self._lesson = replace(self._lesson, decided=Decided.of(self.task, indices, log_policy.exp(), base))
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _decide(self, indices: np.ndarray, anchors: list[str]) -> tuple[Tensor, Tensor]:
        """log pi (N, K) and baselines (N,) of a batch, without gradient; each process passes its share."""
        shares = self.updater.shares(indices)
        if self.estimator != "ppo" and len(shares) == 1:
            self._kept = self.updater.pass_through(indices, shares[0], anchors)
            rows, outcome = shares[0], self._kept.outcome
        else:
            rows = torch.cat(shares).sort().values
            with torch.no_grad():
                outcome = self.learner.pass_through(lambda: self.policy.decide(indices[rows.numpy()]))
        log_policy, values = outcome.log_policy.detach(), outcome.values.detach()
        if self.world.size == 1:
            return log_policy, values
        table = log_policy.new_zeros(len(indices), self.task.n_candidates + 1)
        table[rows, :-1] = -torch.inf
        table[rows, : log_policy.shape[1]] = log_policy
        table[rows, -1] = values
        table = self.world.all_sum(table)
        return table[:, :-1], table[:, -1]

    def _pass_over(self, callback: BaseCallback) -> bool:
        """Leave a batch that cannot be decided; :meth:`train` counts it."""
        env = self.env
        self._lesson = self._kept = None
        self.num_timesteps += env.num_envs
        self._last_obs = env.pass_over()
        rewards, dones = np.full(env.num_envs, np.nan), np.ones(env.num_envs, dtype=bool)
        infos: list[dict[str, Any]] = [{}] * env.num_envs
        callback.update_locals({"rewards": rewards, "dones": dones, "infos": infos})
        if not callback.on_step():
            return False
        callback.on_rollout_end()
        return True

    def dump_logs(self, iteration: int = 0) -> None:
        """Put off to the end of :meth:`train`, as the base class logs a step before it is learned from."""
        self._due = iteration

    def train(self) -> None:
        """One optimiser step on the kept pass, or PPO's epochs over the rollout buffer."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        if self._lesson is None:
            self._skip("the policy is")
        for lesson in self._lessons():
            kept, self._kept = self._kept, None  # the graph is used once
            prices, clip = self.constraints.prices(), self.clip_range(self._current_progress_remaining)
            self.policy.optimizer.param_groups[0]["penalty"] = self.sparsity / prices.unit
            measured, taken = self.updater.step(lesson, prices, clip, kept)
            self._record(measured)
            if taken:
                self.constraints.update(measured)
                self.skipped_in_a_row = 0
            else:
                self._skip("the loss or its gradient is")
        self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/skipped_steps", self.skipped_steps)
        if self._due is not None:
            super().dump_logs(self._due)
            self._due = None

    def _lessons(self) -> Iterator[Lesson]:
        """What is learned of a rollout: the batch, or PPO's minibatches."""
        if self._lesson is None:
            return
        if self.estimator != "ppo":
            yield self._lesson
            return
        for _ in range(self.n_epochs):
            for batch in self.rollout_buffer.get(self.batch_size):
                indices = batch.observations.long().view(-1).cpu().numpy()
                actions = batch.actions.long().view(-1)
                told = batch.returns, batch.advantages, batch.old_log_prob
                yield Lesson(indices, self.task.ambiguous(indices), actions, *told, self.updater.draw_anchors())

    def _skip(self, what: str) -> None:
        """Count a step that was skipped.

        Raises:
            TrainingDiverged: if too many were in a row.
        """
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            steps = "a step was" if self.max_skipped == 1 else f"{self.skipped_in_a_row} steps in a row were"
            reason = f"step {self.steps_done}: {steps} skipped, as {what} not finite"
            raise TrainingDiverged(f"{reason}; lower the learning rate")

    def optimizer_state(self) -> dict[str, Tensor]:
        """See :meth:`trainers.learner.Learner.optimizer_state`; to be called in every process."""
        return self.learner.optimizer_state()

    def load_optimizer_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`optimizer_state` in every process, after the policy's own tensors."""
        self.learner.load_optimizer_state(state)

    def contents(self) -> Contents:
        """See :meth:`trainers.trainer.SteeringTrainer.contents`."""
        optimizer = self.optimizer_state()
        task = self.learner.pass_through(self.task.state_dict)  # which may ask the base model
        tensors, generators = random_state(self.device)
        parts = {"policy": self.policy.state_dict(), "task": task, "optimizer": optimizer, "random": tensors}
        facts = {
            "timesteps": self.num_timesteps,
            "updates": self._n_updates,
            "constraints": self.constraints.state_dict(),
            "skipped": [self.skipped_steps, self.skipped_in_a_row],
            "sampler": self.env.inner.sampler.state_dict(),
            "indices": [int(index) for index in self.env.inner.indices],
            "episodes": [episode["r"] for episode in self.ep_info_buffer or ()],
            "random": generators,
        }
        return Contents(parts, facts)

    def restore(self, contents: Contents) -> None:
        """See :meth:`trainers.trainer.SteeringTrainer.restore`."""
        parts, facts = contents
        require_same_shapes(parts["policy"], self.policy.state_dict())
        self.policy.load_state_dict(parts["policy"])
        self.task.load_state_dict({key: value.to(self.device) for key, value in parts["task"].items()})
        self.load_optimizer_state(dict(parts["optimizer"]))
        self.num_timesteps, self._n_updates = facts["timesteps"], facts["updates"]
        self.constraints.load_state_dict(facts["constraints"])
        self.skipped_steps, self.skipped_in_a_row = facts["skipped"]
        indices = self.env.inner.restore(facts["sampler"], facts["indices"])
        self._last_obs, self._last_episode_starts = indices, np.ones(len(indices), dtype=bool)
        episodes = ({"r": reward, "l": 1, "t": 0.0} for reward in facts["episodes"])
        self.ep_info_buffer = deque(episodes, maxlen=self._stats_window_size)
        self.ep_success_buffer = deque(maxlen=self._stats_window_size)
        restore_random(parts["random"], facts["random"], self.device)

    def whiten(self, batches: int, damping: float = 0.03) -> None:
        """Measure steps in KL from here on (:mod:`trainers.fisher`), by a few batches of the training decisions.

        Args:
            batches: draws of the estimate, each one forward and backward pass over a batch.
            damping: lower bound of a coordinate's share of the mean Fisher information.
        """
        sampler = BlockSampler(self.task.decisions, *self.env.inner.sampler.counts, seed=self.seed or 0)
        self.policy.set_step_sizes(whitening(self.updater.fisher(sampler, batches), damping))
        self.learner.take_over()

    def _record(self, measured: dict[str, float]) -> None:
        self.measured = {
            **measured,
            **self.constraints.coefficients(),
            "running_bias": float((self.task.preference - self.task.target).abs().sum(-1).mean()),
            "sparsity": sparsity(self.policy.steering.parameters()),
        }
        for name, value in self.measured.items():
            self.logger.record(f"train/{name}", value)

    @classmethod
    def load(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Not to be had: an archive holds no backbone, so there is nothing to build the policy from."""
        raise TypeError(
            "build SteeringPPO as for training, then call set_parameters(path), or trainers.state.saved.load_state"
        )

    def _excluded_save_params(self) -> list[str]:
        """The backbone and everything that holds it stay out of SB3's own archives."""
        held = ["_kept", "_lesson", "policy_kwargs", "constraints", "kl", "learner", "updater", "world"]
        return [*super()._excluded_save_params(), *held]
