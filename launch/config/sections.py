"""The sections of a config: every key with its default, what it means and what it needs to have an effect.

Names are those of transformers, TRL and Stable-Baselines3 where they have one. docs/config.md is made from this file.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from launch.config.keys import Mistake, Section, When, key, one_of, plain, section

EMBEDDED = ("smollm2-135m", "gemma3-270m", "vlm-scenes")  # models that are at hand without a download
FREEFORM = ("grpo", "rloo")

SAMPLED = one_of("train.estimator", "reinforce", "ppo")
ON_DECISIONS = one_of("train.estimator", "regression", "expected", "reinforce", "ppo")
REWARDED = one_of("train.estimator", "expected", "reinforce", "ppo", *FREEFORM)
ON_ANSWERS = one_of("train.estimator", *FREEFORM)
DOWNLOADED = When("model.name", lambda name: name not in EMBEDDED, "from the Hub or a folder")
ON_CUDA = When("model.device", lambda device: isinstance(device, str) and device.startswith("cuda"), "cuda")
WITH_BUDGET = When("constraints.kl_budget", lambda budget: budget is not None, "not null")
NEUTRAL = When("constraints.neutral_kl", lambda limit: limit is not None, "a number")
WITHOUT_BUDGET = When("constraints.kl_budget", lambda budget: budget is None, "null")
STARTED = When("steering.init", lambda start: start is not None, "a folder")
BOTH_KINDS = When("train.unambiguous", lambda count: count != 0, "above 0")


def _different(values: Any) -> Any:
    if values is not None and len(set(values)) != len(values):
        raise Mistake("", f"has a value twice: {list(values)}")
    return values


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    for place, value in enumerate(values):
        if value < 0:
            raise Mistake(f"[{place}]", f"must be at least 0, found {value}")
    if not all(low < high for low, high in zip(values, values[1:], strict=False)):
        raise Mistake("", f"must rise, found {list(values)}")
    return values


def _name(value: str | None) -> str | None:
    if value is not None and (value in (".", "..") or {*value} & {*"/\\\0"}):
        raise Mistake("", f"must be a name, not a path, found {value!r}; the place is run.output_dir")
    return value


def _target(value: dict[str, float] | None) -> dict[str, float] | None:
    for group, share in (value or {}).items():
        if not 0 <= share <= 1:
            raise Mistake(group, f"must be within 0 and 1, found {share}")
    if value is not None and abs(math.fsum(value.values()) - 1) > 1e-6:
        raise Mistake("", f"the shares must sum to 1, found {math.fsum(value.values()):g}")
    return value


def _project(value: str) -> str:
    if len(value) > 128 or {*value} & {*"/\\#?%:"}:
        raise Mistake("", f"must be up to 128 characters without / \\ # ? % :, found {value!r}")
    return value


def _tags(values: tuple[str, ...]) -> tuple[str, ...]:
    for place, tag in enumerate(values):
        if not 0 < len(tag) <= 64:
            raise Mistake(f"[{place}]", f"must have 1 to 64 characters, found {len(tag)}")
    return values


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]


class ModelSection(Section):
    """The backbone."""

    name: str = key(
        "smollm2-135m", "an embedded model (smollm2-135m, gemma3-270m, vlm-scenes), a Hub id or a folder", min_length=1
    )
    revision: Text | None = key(None, "of a Hub id: branch, tag or commit", DOWNLOADED)
    dtype: Literal["float32", "bfloat16", "float16"] = key("float32", "of the backbone; operators are float32")
    device: Text | None = key(None, "cuda, cpu, ...; null for the accelerator where there is one", resumes=True)
    max_tokens: int = key(512, "of one forward pass, as memory allows", ge=16, resumes=True)
    attn_implementation: Text | None = key(
        None, "sdpa, eager, flash_attention_2, ...; null for torch's own", DOWNLOADED
    )


class DataSection(Section):
    """The decisions and what is fair. Splits are `train`, `validation` and `test`."""

    set: str = key("roles", "a built-in set, or a .jsonl file", min_length=1)
    options: Annotated[dict[str, Any], BeforeValidator(plain)] = key(
        {}, "of the set (dso.decisions.sets); of roles, free-form runs ask `texts: questions`"
    )
    target: Annotated[dict[str, float] | None, AfterValidator(_target)] = key(
        None, "the fair share of each group; null for equal shares"
    )


class SteeringSection(Section):
    """What is learned, and where it sits."""

    operator: Literal["affine", "bias", "low_rank", "scale"] = key("affine", "at each site")
    rank: int | None = key(None, "of the operator", one_of("steering.operator", "low_rank"), ge=1)
    sites: Annotated[Texts, Field(min_length=1), AfterValidator(_different)] | None = key(
        None, "norms (also null), attention, or patterns of module names (dso/steering/sites.py)"
    )
    init: Text | None = key(
        None, "a steering to start from, a folder or Hub id: of this model, operator and sites", STARTED
    )

    @model_validator(mode="after")
    def _ranked(self) -> SteeringSection:
        if self.operator == "low_rank" and self.rank is None:
            raise Mistake("rank", "operator low_rank needs one, as in rank: 4")
        return self


class OptimizerSection(Section):
    """Adam in units of KL, with a warm-up and a cosine."""

    learning_rate: float = key(5e-4, "the highest; a tenth of the steps warms up", gt=0, freeform=1e-3)
    fisher_batches: int = key(12, "drawn once to measure steps in KL (trainers/fisher.py); 0 for plain Adam", ge=0)


class PreferenceSection(Section):
    """How it is estimated whom the model prefers (envs/preference.py)."""

    estimate: Literal["controlled", "blocked", "context"] = key(
        "controlled",
        "what is kept apart: people and templates (blocked), what the base model answers too (controlled)",
        REWARDED,
        freeform="blocked",
    )
    common_weight: float = key(
        1.0,
        "of what the base model prefers in all contexts alike; 0 leaves it alone, and most of what a block shares",
        ON_DECISIONS,
        one_of("train.preference.estimate", "controlled"),
        ge=0,
        le=1,
    )
    pooling: Literal["linear", "logarithmic"] = key(
        "linear", "of a question's orders; logarithmic takes the order out", one_of("train.estimator", "expected")
    )
    batch_weight: float = key(
        0.3,
        "of the batch's own preference against the running one",
        one_of("train.preference.estimate", "context"),
        ge=0,
        le=1,
    )
    hard: bool = key(False, "estimated from sampled answers, as published", SAMPLED)


class PPOSection(Section):
    """Proximal policy optimisation."""

    n_epochs: int = key(4, "passes over a step's decisions", ge=1)
    clip_range: float = key(0.2, "of the ratio of probabilities", gt=0, lt=1)


class FreeformSection(Section):
    """Sampling of free-form answers."""

    num_generations: int = key(8, "answers a decision; each is held against the others", ge=2)
    max_completion_length: int = key(8, "tokens", ge=1)
    temperature: float = key(1.0, "of sampling", gt=0)
    abstain_reward: float = key(-1.0, "of an answer that names nobody", ge=-1, le=1)


class TrainSection(Section):
    """The policy gradient."""

    estimator: Literal["regression", "expected", "reinforce", "ppo", "grpo", "rloo"] = key(
        "expected",
        "exact (regression, expected) or sampled (reinforce, ppo) over candidates; of free-form answers (grpo, rloo)",
    )
    max_steps: int = key(100, "optimiser steps", ge=1, freeform=60)
    ambiguous: int = key(36, "ambiguous decisions a step", ge=1, freeform=24)
    unambiguous: int = key(8, "unambiguous decisions a step", ge=0)
    unambiguous_weight: float = key(
        0.1, "of their mean reward, beside the ambiguous ones' 1", BOTH_KINDS, ge=0, freeform=0.2
    )
    reward: Literal["sign", "smooth"] = key(
        "smooth", "-1 or +1 (sign), or one that vanishes at parity (smooth)", REWARDED
    )
    gradient_accumulation_steps: int = key(
        1, "parts that a process learns its share of a step in: less memory, more time", ge=1, resumes=True
    )
    gradient_checkpointing: bool = key(False, "compute activations again instead of keeping them", resumes=True)
    seed: int = key(0, "of everything that is drawn", ge=0, le=2**32 - 1)
    full_determinism: bool = key(False, "refuse what is not the same bit for bit when done again", ON_CUDA)
    baseline: Literal["context", "value", "none"] = key("context", "taken off the reward", SAMPLED)
    optimizer: OptimizerSection = section(OptimizerSection)
    preference: PreferenceSection = section(PreferenceSection)
    ppo: PPOSection = section(PPOSection, one_of("train.estimator", "ppo"))
    freeform: FreeformSection = section(FreeformSection, ON_ANSWERS)

    @model_validator(mode="after")
    def _divides(self) -> TrainSection:
        parts, size = self.gradient_accumulation_steps, self.ambiguous + self.unambiguous
        if self.estimator in FREEFORM:
            size *= self.freeform.num_generations
            if size % parts:
                wrong = f"must divide the {size} answers of a step (decisions x num_generations), found {parts}"
                raise Mistake("gradient_accumulation_steps", wrong)
        elif parts > size:
            raise Mistake("gradient_accumulation_steps", f"a step has fewer decisions than {parts} parts")
        return self


class MatcherSection(Section):
    """How it is read whom a free-form answer names (dso.decisions.matching)."""

    rule: Literal["first", "only", "start"] = key("first", "which of several mentions counts")
    after: str | None = key(None, 'what the answer stands behind, as in "Answer:"; null reads the whole text')
    ignore_case: bool = key(False, "of candidates")
    whole_words: bool = key(True, "no mention inside of other words")
    abstentions: Texts | None = key(None, "phrases that decline to choose; null for those of dso.decisions.matching")

    @model_validator(mode="after")
    def _usable(self) -> MatcherSection:
        if self.after == "":
            raise Mistake("after", "the matcher's after is empty; leave it away")
        if not all(phrase.strip() for phrase in self.abstentions or ()):
            raise Mistake("abstentions", "has an empty phrase")
        return self


class ConstraintsSection(Section):
    """What the steering may cost."""

    kl_budget: float | None = key(0.2, "mean nats of KL to the base model, held by dual ascent", gt=0)
    beta: float = key(0.0, "the price of a nat, fixed", WITHOUT_BUDGET, ge=0)
    minimum_beta: float = key(
        0.25, "its least price; above 0 training takes the ways that cost little KL", WITH_BUDGET, gt=0, freeform=0.05
    )
    min_answer_mass: float | None = key(
        None, "share of the base's answer mass that prompts keep in training, and validation as a mean", ON_DECISIONS,
        gt=0, le=1,
    )  # fmt: skip
    neutral_kl: float | None = key(
        None, "mean nats of KL after neutral texts that validation allows, and training in anchors; null for no limit",
        ON_DECISIONS, gt=0,
    )  # fmt: skip
    unambiguous_kl: float | None = key(
        None, "mean nats of KL on unambiguous decisions, in training and on validation; null for no limit",
        ON_DECISIONS, gt=0,
    )  # fmt: skip
    neutral_texts: Text | None = key(None, "a file of them, one a line; null for those that ship", NEUTRAL)
    anchors: Text | None = key(
        None, "a file of texts that training leaves as they are, or shipped; null for none", ON_DECISIONS
    )
    order_increase: float | None = key(
        None, "of the order effect over the base model's, on validation and in training with expected or reinforce; "
        "null for no limit", ON_DECISIONS, ge=0,
    )  # fmt: skip
    max_accuracy_loss: float = key(0.05, "against the base model's answers, of what is kept", ON_ANSWERS, ge=0, le=1)
    sparsity: float = key(0.0, "lambda of the L1 norm, a proximal step", ge=0)


class EvaluationSection(Section):
    """When validation measures, and what the test does at the end."""

    eval_steps: int = key(25, "steps between validations", ge=1, freeform=20)
    samples: int = key(8, "answers a decision", ON_ANSWERS, ge=1)
    scales: Annotated[tuple[float, ...], Field(strict=False, min_length=1), AfterValidator(_rising)] = key(
        (0.0, 0.25, 0.5, 0.75, 1.0), "that the test measures", freeform=(0.0, 1.0)
    )


class WandbSection(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = key("auto", "auto: online with a key, offline without one")
    project: Annotated[str, Field(min_length=1), AfterValidator(_project)] = key("dso", "as wandb.init takes it")
    entity: Text | None = key(None, "as wandb.init takes it; null for the key's own")
    group: Text | None = key(None, "as wandb.init takes it")
    tags: Annotated[Texts, AfterValidator(_different), AfterValidator(_tags)] = key((), "as wandb.init takes them")
    timeout: float = key(30.0, "seconds that the server has to let a run begin, and at the end for the rest", ge=1)


class RunSection(Section):
    """Where a run is kept, and who else hears of it."""

    output_dir: str = key("runs", "the folder of runs", min_length=1)
    run_name: Annotated[Text | None, AfterValidator(_name)] = key(
        None, "of the run's own folder; null for the config's name"
    )
    report_to: Literal["none", "tensorboard", "wandb"] = key("none", "who else hears of it")
    save_steps: int = key(10, "steps between saves: what a run that is killed does again", ge=1)
    ddp_timeout: float = key(600.0, "seconds that processes wait for each other", ge=1, freeform=1800.0, launcher=True)
    wandb: WandbSection = section(WandbSection, one_of("run.report_to", "wandb"))
