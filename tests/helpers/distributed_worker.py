"""Checks for the processes of a launcher: what each finds goes to ``OUT/rank<N>.pt``, and the tests compare it.

    deepspeed --num_gpus 2 tests/helpers/distributed_worker.py OUT [CASE ...] [--fail CONFIG]

With ``--fail`` the command line trains a config twice at last: the second process is stopped after the last step, then
fails in its second step.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import small_runs  # noqa: E402
from small_runs import in_orders, learn, letters_set, make_trainer, operators  # noqa: E402
from tiny import tiny_llama  # noqa: E402

from dso.errors import UserError  # noqa: E402
from envs.reward import RewardConfig  # noqa: E402
from envs.task import DecisionTask  # noqa: E402
from launch.cluster.processes import leave  # noqa: E402
from trainers.checkpointing import checkpoint_layers  # noqa: E402
from trainers.constraints import AnswerMassFloor, KLBudget  # noqa: E402
from trainers.measuring import SharedEvaluator  # noqa: E402
from trainers.parallel.ranks import Ranks, World  # noqa: E402
from trainers.ppo import SteeringPPO  # noqa: E402
from trainers.state.saved import load_state, read_state, save_state  # noqa: E402

# Every part of a step has something to do, and Adam's epsilon is above gradients whose signs would be rounding.
COMMON: dict[str, Any] = {
    "ambiguous": 12, "unambiguous": 4, "baseline": "value", "learning_rate": 0.01, "sparsity": 0.002, "vf_coef": 0.5,
    "anchors": ("It rains.", "Two and two", "Once upon a time"), "anchors_a_step": 3, "n_epochs": 2, "batch_size": 8,
    "reward": RewardConfig(estimate="controlled", width=0.1), "policy": {"optimizer_kwargs": {"eps": 1e-3}},
}  # fmt: skip
POOLED = RewardConfig(estimate="controlled", width=0.1, pooling="logarithmic", common_weight=0.5)
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "accumulation": 2},
    "zero3": {"stage": 3, "max_tokens": 40},  # of the second process, which so takes more passes than the first
    "bfloat16": {"stage": 3, "accumulation": 2, "dtype": torch.bfloat16, "checkpointing": True},
    "regression": {"stage": 3, "estimator": "regression", "accumulation": 2},
    "reinforce": {"stage": 0, "estimator": "reinforce", "accumulation": 3},
    "ppo": {"stage": 1, "estimator": "ppo", "accumulation": 2},
    "pooled": {"stage": 1, "orders": True, "accumulation": 2, "reward": POOLED},
}
OWN = ("stage", "orders", "dtype", "checkpointing", "max_tokens")
TIMEOUT = 90  # seconds that a process waits for the other: a run that hangs ends by then
STEPS = 3


class Noting(Ranks):
    """Notes which passes this process had to make: 1 without gradient, 2 with."""

    passes: list[int] = []

    def most(self, number: int) -> int:
        self.passes.append(number)
        return super().most(number)


def trainer_of(case: dict[str, Any], world: World | None = None) -> SteeringPPO:
    """The trainer of a case: of one process, or as one of several."""
    options = COMMON | {key: value for key, value in case.items() if key not in OWN}
    # Else stage 3 would leave weights as small as these whole.
    zero = {"stage": case["stage"], "stage3_param_persistence_threshold": 0}
    settings = {"zero_optimization": zero} if world else None
    small_runs.tiny_llama = lambda **k: tiny_llama(**k).to(case.get("dtype", torch.float32))
    # A price from the second step on: at the identity it is rounding whether mass is lost.
    limits = {"kl": KLBudget(0.05), "mass_floor": AnswerMassFloor(1.0, learning_rate=5.0)}
    decisions = in_orders(letters_set()) if case.get("orders") else letters_set()
    trainer = make_trainer(decisions, world=world, deepspeed=settings, **limits, **options)
    if world and world.rank == 1:
        trainer.task.backbone.max_tokens = case.get("max_tokens", trainer.task.backbone.max_tokens)
    if case.get("checkpointing"):
        checkpoint_layers(trainer.task.backbone.model)
    return trainer


def run(trainer: SteeringPPO) -> dict[str, Any]:
    """What training from the same start comes to."""
    trainer.whiten(2, damping=0.1)
    learn(trainer, STEPS)
    evaluator = SharedEvaluator(trainer.learner, trainer.task.backbone, trainer.task.decisions, trainer.task.handle)
    measured = evaluator.measure(0.5)
    return {
        "operators": operators(trainer),
        "value head": trainer.policy.value_head.weight.detach().clone(),
        "moments": trainer.optimizer_state(),
        "sizes": trainer.policy.whitening.clone(),
        "measured": dict(trainer.measured),
        "price": trainer.kl.coefficient,
        "preference": trainer.task.preference,
        "random": torch.get_rng_state(),
        "policy": torch.as_tensor(measured.policy),
        "kl": torch.as_tensor(measured.kl),
    }


def resumed(case: dict[str, Any], world: World, folder: Path) -> bool:
    """Whether a run that was saved and goes on in a new trainer is, bit for bit, the run that was not."""
    trainer = trainer_of(case, world)
    trainer.whiten(2)
    learn(trainer, 2)
    save_state(folder, trainer, {}, {})
    learn(trainer, 2)
    wanted = operators(trainer) | trainer.optimizer_state()
    trainer.learner.close()
    world.barrier()
    again = trainer_of(case, world)
    load_state(read_state(folder), again)
    learn(again, 2)
    found = operators(again) | again.optimizer_state()
    again.learner.close()
    return all(torch.equal(value, found[key]) for key, value in wanted.items())


def skipped(case: dict[str, Any], world: World) -> tuple[int, bool, bool]:
    """Steps skipped, as a single process has a number that is not finite; whether that one, and the next, moved."""
    trainer = trainer_of(case, world)
    learn(trainer, 1)
    task, before = trainer.task, operators(trainer)
    if world.rank == 1:
        task.reference = lambda handles: DecisionTask.reference(task, handles) * torch.nan
    learn(trainer, 1)
    still = all(torch.equal(value, before[key]) for key, value in operators(trainer).items())
    vars(task).pop("reference", None)
    learn(trainer, 1)
    moved = any(not torch.equal(value, before[key]) for key, value in operators(trainer).items())
    trainer.learner.close()
    return trainer.skipped_steps, still, moved


def stopped(config: str, rank: int) -> int:
    """Train from the command line; the second process alone is told to stop, after the last step."""
    from launch.cli import main as command

    learned = SteeringPPO.train

    def train(self: SteeringPPO) -> None:
        learned(self)
        if rank == 1 and self.steps_done == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)

    settings = str(Path(config).with_name("zero2.json"))
    SteeringPPO.train = train
    try:
        return command(["train", config, "--deepspeed", settings, f"train.max_steps={STEPS}", "run.run_name=stopped"])
    finally:
        SteeringPPO.train = learned


def fail(config: str) -> int:
    """Train from the command line; the second process cannot go on."""
    from launch.cli import main as command

    learned = SteeringPPO.train

    def train(self: SteeringPPO) -> None:
        if self.world.rank == 1 and self.steps_done == 2:
            raise UserError("the memory of this machine is gone")
        learned(self)

    SteeringPPO.train = train
    return command(["train", config, "--deepspeed", str(Path(config).with_name("zero2.json"))])


def main() -> int:
    """Run the cases, and what is asked for besides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--fail")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = Noting(torch.device("cpu"), timeout=TIMEOUT)
    found: dict[str, Any] = {}
    for name in arguments.cases:
        world.passes = []
        trainer = trainer_of(CASES[name], world)
        found[name] = run(trainer)
        found[f"passes {name}"] = [world.passes.count(1), world.passes.count(2)]
        trainer.learner.close()
    if arguments.fail:
        for name in ("zero0", "zero1", "zero3"):
            found[f"resumed {name}"] = resumed(CASES[name], world, arguments.out / name)
            found[f"skipped {name}"] = skipped(CASES[name], world)
        found["stopped"] = stopped(arguments.fail, world.rank)
    torch.save(found, arguments.out / f"rank{world.rank}.pt")
    world.barrier()
    if arguments.fail:
        return fail(arguments.fail)
    world.close()
    return 0


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"]
    leave(main())
