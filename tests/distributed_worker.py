"""Checks for the processes of a launcher: what each finds goes to ``OUT/rank<N>.pt``, and the tests compare it.

    deepspeed --num_gpus 2 tests/distributed_worker.py OUT CASE [CASE ...]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from training import learn, letters_set, make_trainer, operators  # noqa: E402

from envs.task import RewardConfig  # noqa: E402
from trainers.constraints import KLBudget  # noqa: E402
from trainers.distributed import Ranks, World  # noqa: E402
from trainers.ppo import SteeringPPO  # noqa: E402

ANCHORS = ("It rains.", "Two and two", "Once upon a time")
# Every part of a step has something to do, and a step is far from small gradients, whose signs would be noise.
COMMON: dict[str, Any] = {
    "ambiguous": 12, "unambiguous": 4, "baseline": "value", "learning_rate": 0.01, "sparsity": 0.002, "vf_coef": 0.5,
    "anchors": ANCHORS, "anchors_a_step": 3, "n_epochs": 2, "batch_size": 8,
    "reward": RewardConfig(estimate="blocked", width=0.1), "policy": {"optimizer_kwargs": {"eps": 1e-3}},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "parts": {"stage": 2, "accumulation": 2},
    "parts3": {"stage": 3, "accumulation": 2},
    "reinforce": {"stage": 2, "estimator": "reinforce"},
    "ppo": {"stage": 1, "estimator": "ppo", "accumulation": 2},
}
STEPS = 4


def trainer_of(case: dict[str, Any], world: World | None = None) -> SteeringPPO:
    """The trainer of a case: of one process, or as one of several."""
    options = COMMON | {key: value for key, value in case.items() if key != "stage"}
    settings = {"zero_optimization": {"stage": case["stage"]}} if world else None
    return make_trainer(letters_set(), kl=KLBudget(0.05), world=world, deepspeed=settings, **options)


def run(trainer: SteeringPPO) -> dict[str, Any]:
    """What training from the same start comes to."""
    trainer.whiten(2, damping=0.1)
    sizes = trainer.policy.whitening.clone()
    learn(trainer, STEPS)
    return {
        "operators": operators(trainer),
        "value": trainer.policy.value_head.weight.detach().clone(),
        "moments": trainer.optimizer_state(),
        "sizes": sizes,
        "measured": dict(trainer.measured),
        "price": trainer.kl.coefficient,
        "preference": trainer.task.preference,
        "random": torch.get_rng_state(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = Ranks(torch.device("cpu"), timeout=120)
    found = {}
    for name in arguments.cases:
        trainer = trainer_of(CASES[name], world)
        found[name] = run(trainer)
        trainer.learner.close()
    torch.save(found, arguments.out / f"rank{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    main()
