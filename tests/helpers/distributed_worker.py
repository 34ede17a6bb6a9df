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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))

import small_runs  # noqa: E402
from architectures import tiny  # noqa: E402
from small_runs import in_orders, learn, letters_set, make_trainer, operators  # noqa: E402
from tiny import byte_tokenizer, tiny_llama  # noqa: E402

from dso.errors import UserError  # noqa: E402
from dso.models.backbone import Backbone  # noqa: E402
from envs.reward import RewardConfig  # noqa: E402
from envs.task import DecisionTask  # noqa: E402
from launch.cluster.processes import leave  # noqa: E402
from trainers.checkpointing import checkpoint_layers  # noqa: E402
from trainers.constraints import AnswerMassFloor, KLBudget, OrderLimit  # noqa: E402
from trainers.measuring import SharedEvaluator  # noqa: E402
from trainers.parallel.loading import dividing  # noqa: E402
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
OWN = ("stage", "orders", "dtype", "checkpointing", "max_tokens", "model")
DIVIDED = ("zero3", "bfloat16")  # cases of which the model is also loaded in parts
ARCHITECTURES = ("Mamba", "Mixtral")  # reads weights of layers that it does not call; stores experts one by one
TIMEOUT = 90  # seconds that a process waits for the other: a run that hangs ends by then
STEPS = 3


class Noting(Ranks):
    """Notes which passes this process had to make: 1 without gradient, 2 with."""

    passes: list[int] = []

    def most(self, number: int) -> int:
        self.passes.append(number)
        return super().most(number)


def tiny_in(dtype: torch.dtype, **options: Any) -> torch.nn.Module:
    """A tiny model as it is loaded in a dtype: what positions are turned by stays float32."""
    model = tiny_llama(**options)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def trainer_of(case: dict[str, Any], world: World | None = None) -> SteeringPPO:
    """The trainer of a case: of one process, or as one of several."""
    options = COMMON | {key: value for key, value in case.items() if key not in OWN}
    small_runs.tiny_llama = case.get("model", lambda **k: tiny_in(case.get("dtype", torch.float32), **k))
    # A price from the second step on: at the identity it is rounding whether mass is lost.
    limits = {
        "kl": KLBudget(0.05),
        "mass_floor": AnswerMassFloor(1.0, learning_rate=5.0),
        "anchor_limit": KLBudget(1e-5),
        "unambiguous_limit": KLBudget(1e-3, initial=1.0),
        "order": OrderLimit(0.0) if case.get("orders") else None,
    }
    decisions = in_orders(letters_set()) if case.get("orders") else letters_set()
    trainer = make_trainer(decisions, world=world, deepspeed=settings_of(case) if world else None, **limits, **options)
    if world and world.rank == 1:
        trainer.task.backbone.max_tokens = case.get("max_tokens", trainer.task.backbone.max_tokens)
    if case.get("checkpointing"):
        checkpoint_layers(trainer.task.backbone.model)
    return trainer


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration; else stage 3 would leave weights as small as these whole."""
    return {"zero_optimization": {"stage": case["stage"], "stage3_param_persistence_threshold": 0}}


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


def loaded(name: str, world: World, folder: Path) -> dict[str, Any]:
    """What comes of a case whose model is divided as it is loaded, and what :func:`watched` counts of it."""
    dtype = CASES[name].get("dtype", torch.float32)
    if world.is_main:
        tiny_in(dtype).save_pretrained(folder)
    world.barrier()
    with ExitStack() as loading:
        held = loading.enter_context(watched())
        loading.enter_context(dividing(settings_of(CASES[name]), world, str(dtype).removeprefix("torch.")))
        model = {"model": lambda **_: AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), "loading": loading}
        trainer = trainer_of(CASES[name] | model, world)
    config, layout = trainer.policy.steering.config, trainer.task.backbone.layout
    found = {"held": held, "sites": config.sites, "weights": config.fingerprint, "layout": layout, "run": run(trainer)}
    trainer.learner.close()
    return found


def same_scores(name: str, world: World, folder: Path) -> bool:
    """Whether an architecture scores alike, bit for bit, where each process loads it whole and where it is divided."""
    if world.is_main:
        tiny(name).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    world.barrier()
    decisions = list(letters_set())
    whole = Backbone.load(str(folder), device="cpu").score(decisions).log_probs
    with dividing(settings_of({"stage": 3}), world, "float32"):
        return torch.equal(Backbone.load(str(folder), device="cpu").score(decisions).log_probs, whole)


def misfit(world: World, folder: Path) -> str:
    """What a process hears of a checkpoint whose weights have other shapes than its config says; one reads it."""
    if world.is_main:
        model = tiny_llama()
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        model.config.intermediate_size *= 2
        model.config.save_pretrained(folder)
    world.barrier()
    try:
        with dividing(settings_of({"stage": 3}), world, "float32"):
            Backbone.load(str(folder), device="cpu")
    except UserError as error:
        return str(error)
    return "loaded"


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """Counts weights' elements in this process: whole at a time at most, whole after the block, and its shares."""
    from deepspeed.runtime.zero.partition_parameters import Init

    convert, partition = Init._convert_to_deepspeed_param, Init._partition_param
    made: list[Any] = []
    held = {"most": 0}

    def noted(init: Any, parameter: Any) -> None:
        made.append(parameter)
        convert(init, parameter)

    def counted(init: Any, parameter: Any, *rest: Any, **options: Any) -> Any:
        held["most"] = max(held["most"], sum(each.numel() for each in made))
        return partition(init, parameter, *rest, **options)

    Init._convert_to_deepspeed_param, Init._partition_param = noted, counted
    try:
        yield held
    finally:
        Init._convert_to_deepspeed_param, Init._partition_param = convert, partition
        held["after"] = sum(each.numel() for each in made)
        held["shares"] = sum(each.ds_tensor.numel() for each in made)


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
        for name in DIVIDED:
            found[f"loaded {name}"] = loaded(name, world, arguments.out / f"model-{name}")
        for name in ARCHITECTURES:
            found[f"scores {name}"] = same_scores(name, world, arguments.out / name)
        found["misfit"] = misfit(world, arguments.out / "misfit")
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
