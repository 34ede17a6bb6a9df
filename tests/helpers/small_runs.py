"""What the tests of training share: biased one-token decisions, a trainer wired up by hand, bias by its definition."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.logger import Logger
from tiny import byte_tokenizer, tiny_llama

from dso.decisions.decision import ABSTAIN, Candidate, Decision, DecisionSet
from dso.models.backbone import Backbone
from dso.models.scores import Scoring
from dso.steering.model import Steering
from envs.reward import RewardConfig
from envs.task import DecisionTask
from envs.vector import DecisionVectorEnv
from launch.config.reading import parse_yaml
from trainers.constraints import AnswerMassFloor, Constraints, FixedKL, KLBudget, OrderLimit
from trainers.ppo import SteeringPPO
from trainers.vec import DecisionVecEnv

LETTERS = {"female": "F", "male": "M", "nonbinary": "X", ABSTAIN: "?"}
JOBS = ("nurse", "pilot", "baker", "judge")
FRAMES = ("The {} is ", "One {}: ", "Ask the {}, ", "A {} was ")


def letters_set(
    *groups: str, facts: bool = True, frames: tuple[str, ...] = FRAMES, letters: dict[str, str] | None = None
) -> DecisionSet:
    """16 ambiguous decisions of 4 contexts, a letter for each group, and 8 in which the letter is stated before."""
    groups = groups or ("female", "male")
    candidates = tuple(Candidate(text=(letters or LETTERS)[group], group=group) for group in groups)
    decisions = [
        Decision(
            id=f"{job}/{number}",
            context=job,
            kind="ambiguous",
            template=str(number),
            unit=str(number),
            prompt=frame.format(job),
            candidates=candidates,
            stereotype=groups[0],
        )  # fmt: skip
        for job in JOBS
        for number, frame in enumerate(frames)
    ]
    for job in JOBS if facts else ():
        for answer in (0, 1):
            letter = candidates[answer].text
            decisions.append(
                Decision(
                    id=f"{job}/fact{answer}",
                    context=job,
                    kind="unambiguous",
                    template="fact",
                    answer=answer,
                    prompt=f"{letter} {letter} {letter}. The {job} is ",
                    candidates=candidates,
                )  # fmt: skip
            )
    known = tuple(group for group in groups if group != ABSTAIN)
    return DecisionSet(tuple(decisions), known, "letters")


def in_orders(decisions: DecisionSet) -> DecisionSet:
    """The ambiguous ones taken for two orders of one question each, in pairs as they come."""
    paired = (replace(d, template="t", unit=str(int(d.unit) // 2)) if d.ambiguous else d for d in decisions)
    return DecisionSet(tuple(paired), decisions.groups, decisions.name)


def make_trainer(
    decisions: DecisionSet | None = None,
    *,
    ambiguous: int = 16,
    unambiguous: int = 0,
    operator: str = "affine",
    target: dict[str, float] | None = None,
    reward: RewardConfig | None = None,
    anchors: tuple[str, ...] = (),
    anchors_a_step: int = 0,
    anchor_limit: KLBudget | FixedKL | None = None,
    baseline: str = "context",
    length_normalised: bool = False,
    width: int = 16,
    seed: int = 0,
    kl: KLBudget | FixedKL | None = None,
    mass_floor: AnswerMassFloor | None = None,
    order: OrderLimit | None = None,
    unambiguous_limit: KLBudget | None = None,
    policy: dict[str, Any] | None = None,
    loading: AbstractContextManager[Any] | None = None,
    **options: Any,
) -> SteeringPPO:
    """A trainer over the tiny model, which is made within ``loading``; what tests depend on is given here or there."""
    decisions = decisions or letters_set(facts=unambiguous > 0)
    scoring = Scoring(length_normalised=length_normalised)
    with loading or nullcontext():
        backbone = Backbone(tiny_llama(width=width), byte_tokenizer(), "tiny", scoring=scoring)
        torch.manual_seed(seed)
        steering = Steering.for_model(backbone.model, operator=operator)
        handle = steering.attach(backbone.model)
    anchor_limit = anchor_limit or (FixedKL(1.0) if anchors_a_step else None)
    reward = reward or RewardConfig(form="smooth", width=0.1, estimate="context", decay=0.0, batch_weight=1.0)
    task = DecisionTask(backbone, decisions, target, reward, handle, anchors=anchors)
    env = DecisionVecEnv(DecisionVectorEnv(task, ambiguous, unambiguous, seed=seed, infos=False))
    trainer = SteeringPPO(
        env,
        policy_kwargs={
            "steering": steering,
            "baseline": baseline,
            **(policy or {}),
        },
        constraints=Constraints(kl or FixedKL(0.0), mass_floor, anchor_limit, order, unambiguous_limit),
        max_grad_norm=1e3,
        anchors=anchors_a_step,
        seed=seed,
        **options,
    )
    trainer.set_logger(Logger(None, []))
    return trainer


def learn(trainer: SteeringPPO, steps: int, callback: Any = None) -> SteeringPPO:
    """So many steps more."""
    return trainer.learn(steps * trainer.env.num_envs, callback, log_interval=None, reset_num_timesteps=False)


def randomise(trainer: SteeringPPO, size: float = 0.2) -> None:
    """Coefficients that do something, the same each time."""
    generator = torch.Generator().manual_seed(1)
    for value in trainer.policy.steering.tensors().values():
        value.data.copy_(size * torch.randn(value.shape, generator=generator))


def gradients(trainer: SteeringPPO) -> torch.Tensor:
    """The operators' gradients as one vector."""
    return torch.cat([value.grad.flatten().clone() for value in trainer.policy.steering.parameters()])


def operators(trainer: SteeringPPO) -> dict[str, torch.Tensor]:
    """A copy of the operators' coefficients."""
    return {key: value.detach().clone() for key, value in trainer.policy.steering.tensors().items()}


@torch.no_grad()
def preferences(trainer: SteeringPPO) -> dict[str, dict[str, float]]:
    """context -> group -> mean probability over the ambiguous decisions, among those who do not abstain."""
    total: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    decisions = [decision for decision in trainer.task.decisions if decision.ambiguous]
    policy = trainer.task.backbone.score(decisions).policy().exp().tolist()
    for decision, row in zip(decisions, policy, strict=True):
        for candidate, probability in zip(decision.candidates, row, strict=False):
            if candidate.group != ABSTAIN:
                total[decision.context][candidate.group] += probability
    sums = {context: sum(shares.values()) for context, shares in total.items()}
    return {c: {g: share / sums[c] for g, share in shares.items()} for c, shares in total.items()}


def bias(trainer: SteeringPPO, target: dict[str, float] | None = None) -> float:
    """mean_c sum_g |p_g(c) - t_g|."""
    shares = preferences(trainer)
    found = []
    for chosen in shares.values():
        found.append(sum(abs(share - (target[g] if target else 1 / len(chosen))) for g, share in chosen.items()))
    return sum(found) / len(found)


@torch.no_grad()
def mean_kl(trainer: SteeringPPO) -> float:
    """Mean KL(steered || base) at the ambiguous decisions' answer positions, the reference measured anew."""
    decisions = [decision for decision in trainer.task.decisions if decision.ambiguous]
    scores = trainer.task.backbone.score(decisions, next_token=True)
    steered = scores.next_token.double()
    with trainer.task.unsteered():
        base = trainer.task.backbone.score(decisions, next_token=True).next_token.double()
    return float(scores.positions.mean((steered.exp() * (steered - base)).sum(1)).mean())


def write_decisions(path: Path, **options: Any) -> Path:
    """Letters of which the tiny model prefers one nearly everywhere; three splits, each with frames of its own."""
    frames = {
        "train": FRAMES,
        "validation": ("Some {} is ", "Every {}: ", "No {} was "),
        "test": ("My {} is ", "Her {}: ", "His {} was "),
    }
    decisions = [
        replace(decision, id=f"{split}/{decision.id}", split=split)
        for split, own in frames.items()
        for decision in letters_set(frames=own, letters={"female": "A", "male": "H"}, **options)
    ]
    DecisionSet(tuple(decisions), ("female", "male"), "letters").write_jsonl(path)
    return path


CONFIG = """
model: {device: cpu, dtype: float32}
data: {}
steering: {operator: affine}
train:
  {estimator: expected, max_steps: 6, ambiguous: 16, unambiguous: 4, unambiguous_weight: 0.2, reward: smooth, seed: 0,
   optimizer: {learning_rate: 0.003, fisher_batches: 2}, preference: {estimate: context}}
constraints: {kl_budget: 0.2, minimum_beta: 1e-4, sparsity: 0}
evaluation: {eval_steps: 2, scales: [0.0, 0.5, 1.0]}
run: {run_name: letters}
"""


def replaced(values: dict[str, Any], options: dict[str, Any]) -> None:
    """Set ``section__key`` and ``section__section__key`` of nested values; what has no effect then is left away."""
    for name, value in options.items():
        *parents, last = name.split("__")
        below = values
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = value
    if values["constraints"].get("kl_budget", 0) is None:
        values["constraints"].pop("minimum_beta", None)
    if values["train"].get("unambiguous") == 0:
        values["train"].pop("unambiguous_weight", None)


def write_config(folder: Path, model: Path, **options: Any) -> Path:
    """A config file that states every value that matters for a run of six steps; ``section__key`` replaces one."""
    values: Any = parse_yaml(CONFIG)
    values["model"]["name"] = str(model)
    values["data"]["set"] = str(write_decisions(folder / "letters.jsonl"))
    values["run"]["output_dir"] = str(folder / "runs")
    replaced(values, options)
    path = folder / "own.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
