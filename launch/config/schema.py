"""The config of a training run: typed sections, defaults that are the default run, and how one is found and read.

A config is the name of a file in the package ``configs`` or a path to a YAML file, and then ``key=value`` overrides::

    config = load_config("smollm2-roles", ["train.steps=50", "constraints.kl_budget=0.05"])
    config.train.steps

Every section refuses impossible values when it is made. What a run used is written by :func:`resolved_yaml`, which
reads back as an equal config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

from launch.config.bounds import (
    at_least,
    below_one,
    different,
    filled,
    of_adam,
    one_price,
    place_of_run,
    positive,
    rising,
    share,
    within,
)
from launch.config.reading import ConfigError, build, dump_yaml, nearest, override, parse_override, parse_yaml, require

__all__ = ["ConfigError", "TrainConfig", "known_configs", "load_config", "read_config", "resolved_yaml"]

T = TypeVar("T")


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelSection:
    """The backbone: ``smollm2-135m`` is the embedded model, else a hub id or a folder."""

    name: str = "smollm2-135m"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str | None = None  # the accelerator where there is one
    max_tokens: int = 512  # of one forward pass

    def __post_init__(self) -> None:
        at_least(16, max_tokens=self.max_tokens)
        filled(name=self.name, revision=self.revision, device=self.device)


@dataclass(kw_only=True, slots=True, frozen=True)
class DataSection:
    """The decisions: a built-in set or a .jsonl file, what is fair, and which split serves what."""

    set: str = "roles"
    options: dict[str, Any] = field(default_factory=dict)  # passed to dso.decisions.sets.load_decisions
    groups: tuple[str, ...] | None = None  # those of the set
    target: dict[str, float] | None = None  # uniform
    train_split: str = "train"
    validation_split: str = "validation"
    test_splits: tuple[str, ...] = ("test", "test-names", "test-templates", "test-contexts")

    def __post_init__(self) -> None:
        filled(set=self.set, train_split=self.train_split, validation_split=self.validation_split)
        filled(test_splits=self.test_splits)
        different(groups=self.groups, test_splits=self.test_splits)
        require(self.groups is None or len(self.groups) >= 2, "groups", "must name at least two groups")
        if self.target is not None:
            share(**{f"target.{group}": share for group, share in self.target.items()})
            total = math.fsum(self.target.values())
            require(abs(total - 1) <= 1e-6, "target", f"the shares must sum to 1, found {total:g}")
            same = self.groups is None or {*self.groups} == {*self.target}
            require(same, "target", f"names {sorted(self.target)}, but groups are {sorted(self.groups or ())}")
        for name in ("train_split", "validation_split"):
            split = getattr(self, name)
            require(split not in self.test_splits, name, f"{split!r} is also a test split")
        apart = self.train_split != self.validation_split
        require(apart, "validation_split", f"{self.train_split!r} is also the train split")


@dataclass(kw_only=True, slots=True, frozen=True)
class SteeringSection:
    """What is learned, and where it sits."""

    operator: Literal["affine", "bias", "low_rank"] = "affine"
    rank: int | None = None  # of low_rank
    sites: tuple[str, ...] | None = (
        None  # norms (also if None), attention, or patterns of names (dso/steering/sites.py)
    )

    def __post_init__(self) -> None:
        low_rank = self.operator == "low_rank"
        require(self.rank is not None or not low_rank, "rank", "operator low_rank needs one, as in rank: 4")
        require(self.rank is None or low_rank, "rank", f"operator {self.operator} has none; remove it")
        at_least(1, rank=self.rank)
        filled(sites=self.sites)
        different(sites=self.sites)


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainSection:
    """The policy gradient."""

    estimator: Literal["expected", "reinforce", "ppo"] = "expected"
    steps: int = 100
    ambiguous: int = 36  # decisions, a step
    unambiguous: int = 8  # decisions, a step
    unambiguous_weight: float = 0.1  # of their mean reward, beside the ambiguous decisions' 1
    learning_rate: float = 5e-4
    betas: tuple[float, ...] = (0.9, 0.999)  # of Adam
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.1  # share of the steps in which the learning rate rises: preferences are not known yet
    reward: Literal["sign", "smooth"] = "smooth"
    dead_zone: float = 0.0  # deviations from the target up to here earn nothing
    smooth_width: float = 0.05  # the deviation at which the smooth reward reaches +-1
    abstain_reward: float = -1.0
    fisher_batches: int = (
        12  # drawn once to measure steps in KL (trainers/fisher.py); 0 leaves coefficients as they are
    )
    fisher_damping: float = 0.1  # share of the mean Fisher information that every coordinate has at least
    adam_eps: float = 0.03  # near the gradients' own size, so that coordinates without a clear gradient stay put
    preference: Literal["controlled", "blocked", "context"] = "controlled"  # estimate of it (envs/preference.py)
    preference_decay: float = 0.9  # of the running preference
    context_decay: float = 0.85  # of a context's own part in it, with blocked
    hard_preference: bool = False  # preferences from sampled answers, as published
    batch_weight: float = 0.3  # of the batch's own preference against the running one, with context
    local_weight: float = 0.7  # of a block's own evidence on a context against the running one, with blocked
    unit_weight: float = 0.3  # of the preference among the people at hand against the context's, with blocked
    common_weight: float = 1.0  # of what the base model prefers in all contexts alike, with controlled
    pooling: Literal["linear", "logarithmic"] = "linear"  # of a question's orders; logarithmic takes the order out
    baseline: Literal["context", "value", "none"] = "context"
    ppo_epochs: int = 4
    clip_range: float = 0.2
    max_grad_norm: float = 1e3
    accumulation: int = 1  # parts that a process learns its share of a step in; more take less memory and more time
    gradient_checkpointing: bool = False  # layers' activations are computed again in the backward pass, not kept
    max_skipped: int = 5  # steps in a row whose numbers are not finite before the run stops
    length_normalised: bool = False  # candidates' log-probabilities by their number of tokens
    seed: int = 0
    threads: int | None = None  # torch's own choice
    deterministic: bool = False  # refuse operations that would keep a resumed run from being the same bit for bit

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, ambiguous=self.ambiguous, ppo_epochs=self.ppo_epochs, threads=self.threads)
        at_least(1, accumulation=self.accumulation, max_skipped=self.max_skipped)
        at_least(0, unambiguous=self.unambiguous, fisher_batches=self.fisher_batches)
        enough = self.accumulation <= self.ambiguous + self.unambiguous
        require(enough, "accumulation", f"a step has fewer decisions than {self.accumulation} parts")
        positive(fisher_damping=self.fisher_damping)
        at_least(0, unambiguous_weight=self.unambiguous_weight)
        of_adam(self.betas)
        sampled = self.estimator != "expected" or not self.hard_preference
        require(sampled, "hard_preference", "estimator expected samples no answers; use reinforce or ppo")
        positive(
            learning_rate=self.learning_rate,
            adam_eps=self.adam_eps,
            smooth_width=self.smooth_width,
            max_grad_norm=self.max_grad_norm,
        )
        share(
            dead_zone=self.dead_zone,
            batch_weight=self.batch_weight,
            local_weight=self.local_weight,
            unit_weight=self.unit_weight,
            common_weight=self.common_weight,
            warmup=self.warmup,
        )
        known = self.common_weight == 1 or self.preference == "controlled"
        require(known, "common_weight", "below 1 it needs preference controlled, which knows the base model's")
        single = self.pooling == "linear" or self.estimator == "expected"
        require(single, "pooling", "logarithmic needs estimator expected; the others are paid for single answers")
        require(self.dead_zone < 1, "dead_zone", "must be below 1: no deviation is larger")
        why = ": nothing would be learned from a batch"
        below_one(why, preference_decay=self.preference_decay, context_decay=self.context_decay)
        require(0 < self.clip_range < 1, "clip_range", f"must be between 0 and 1, found {self.clip_range}")
        within(-1, 1, abstain_reward=self.abstain_reward)
        within(0, 2**32 - 1, seed=self.seed)


@dataclass(kw_only=True, slots=True, frozen=True)
class ConstraintsSection:
    """What the steering may cost: nats of KL to the base model, neurons that are not zero."""

    kl_budget: float | None = 0.2  # held by dual ascent
    kl_margin: float = 0.7  # share of the budget to aim at, and to validate with: unseen templates cost more
    kl_coefficient: float | None = None  # fixed instead
    dual_learning_rate: float = 0.1
    initial_beta: float = 0.5  # price of one nat at the start
    minimum_beta: float = 0.25  # and the least; above 0 training takes the ways that cost little KL
    min_answer_mass: float | None = None  # share of the base's that prompts keep; validation asks for a mean of 0.9
    sparsity: float = 0.0  # lambda of the L1 norm
    anchors: str | None = None  # a file of neutral texts, one a line, whose KL counts too

    def __post_init__(self) -> None:
        positive(
            kl_budget=self.kl_budget,
            dual_learning_rate=self.dual_learning_rate,
            initial_beta=self.initial_beta,
            minimum_beta=self.minimum_beta,
        )
        at_least(0, kl_coefficient=self.kl_coefficient, sparsity=self.sparsity)
        share(kl_margin=self.kl_margin, min_answer_mass=self.min_answer_mass)
        positive(kl_margin=self.kl_margin, min_answer_mass=self.min_answer_mass)
        filled(anchors=self.anchors)
        one_price(self.kl_budget, self.kl_coefficient)

    @property
    def aimed_kl(self) -> float | None:
        """Nats that training aims at and that validation may use; None without a budget."""
        return None if self.kl_budget is None else self.kl_margin * self.kl_budget


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluationSection:
    """How often the validation split is measured, and how the test splits are at the end."""

    every: int = 25  # steps
    validation_stride: int = 3  # a unit is validated in every third context: more people for the same time
    training_decisions: int = 0  # whose KL is held to the budget too; 160 where validation's few texts are cheap ones
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    bootstrap: int = 1000  # resamples of an interval

    def __post_init__(self) -> None:
        at_least(1, every=self.every, bootstrap=self.bootstrap, validation_stride=self.validation_stride)
        at_least(0, training_decisions=self.training_decisions)
        rising(scales=self.scales)


@dataclass(kw_only=True, slots=True, frozen=True)
class WandbSection:
    """Weights & Biases, for ``tracking: wandb``."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"  # online with a key, offline without one
    project: str = "dso"
    entity: str | None = None  # the key's own
    group: str | None = None
    tags: tuple[str, ...] = ()
    timeout: float = 30.0  # seconds that the server has to let a run begin, and again at the end for the rest

    def __post_init__(self) -> None:
        filled(project=self.project, entity=self.entity, group=self.group)
        nameable = len(self.project) <= 128 and not {*self.project} & {*"/\\#?%:"}
        require(nameable, "project", f"must be up to 128 characters without / \\ # ? % :, found {self.project!r}")
        different(tags=self.tags)
        for place, tag in enumerate(self.tags):
            require(0 < len(tag) <= 64, f"tags[{place}]", f"must have 1 to 64 characters, found {len(tag)}")
        at_least(1, timeout=self.timeout)


@dataclass(kw_only=True, slots=True, frozen=True)
class RunSection:
    """Where a run is kept, and who else hears of it."""

    folder: str = "runs"
    name: str | None = None  # the config's
    tracking: Literal["none", "tensorboard", "wandb"] = "none"
    wandb: WandbSection = field(default_factory=WandbSection)
    save_every: int = 10  # steps; how much a run that is killed has to do again
    timeout: float = 600.0  # seconds that processes of a run wait for each other before they give up

    def __post_init__(self) -> None:
        at_least(1, save_every=self.save_every, timeout=self.timeout)
        place_of_run(self.folder, self.name)


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainConfig:
    """Everything that a training run is told."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    steering: SteeringSection = field(default_factory=SteeringSection)
    train: TrainSection = field(default_factory=TrainSection)
    constraints: ConstraintsSection = field(default_factory=ConstraintsSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    run: RunSection = field(default_factory=RunSection)


def known_configs(folder: str = ".") -> tuple[str, ...]:
    """The names of the shipped configs: of ``dso train``, or those that a folder of the package ``configs`` holds."""
    names = (entry.name for entry in files("configs").joinpath(folder).iterdir() if entry.is_file())
    return tuple(sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml")))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a shipped name or a YAML file, with ``key=value`` overrides applied in order.

    Raises:
        ConfigError: as :func:`read_config`.
    """
    return read_config(TrainConfig, name_or_path, overrides)


def read_config(kind: type[T], name_or_path: str, overrides: Sequence[str] = (), folder: str = ".") -> T:
    """A config of any kind, with ``key=value`` overrides applied in order.

    Args:
        kind: the dataclass of its sections.
        name_or_path: the name of a shipped config, or a path to a YAML file.
        folder: of the package ``configs``, which holds the shipped ones of this kind.

    Raises:
        ConfigError: if there is no such config, or it or an override holds a mistake; the message names the file or
            the override, the dotted path, and what to do.
    """
    source, text = _read(str(name_or_path), folder)
    parsed = [(item, *parse_override(item)) for item in overrides]
    try:
        raw = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    sections = ", ".join(entry.name for entry in fields(kind))
    require(isinstance(raw, dict), "", f"{source}: expected a mapping of sections ({sections})")
    try:
        for _, path, value in parsed:
            raw = override(kind, raw, path, value)
        return build(kind, raw)
    except ConfigError as error:
        blamed = next((item for item, path, _ in reversed(parsed) if _related(path, error.path)), None)
        where = source if blamed is None else f"override {blamed!r}"
        raise ConfigError(f"{where}: {error}") from error


def resolved_yaml(config: object) -> str:
    """Every value of a config, the defaults too, as YAML that :func:`read_config` reads back as an equal config."""
    return dump_yaml(config)


def _related(path: str, other: str) -> bool:
    """Whether one dotted path is the other, or holds it."""
    left, right = re.split(r"[.[]", path), re.split(r"[.[]", other)
    return all(a == b for a, b in zip(left, right, strict=False))


def _read(name_or_path: str, folder: str) -> tuple[str, str]:
    """The text of a config, and what messages call it."""
    known = known_configs(folder)
    if name_or_path in known:
        shipped = files("configs").joinpath(folder, f"{name_or_path}.yaml")
        return f"config {name_or_path}", shipped.read_text(encoding="utf-8")
    path = Path(name_or_path)
    stem = path.name.removesuffix(".yaml")
    guess = nearest(stem, known)
    hint = f"did you mean {guess}?" if guess else f"shipped ones are {', '.join(known)}"
    if path.suffix not in (".yaml", ".yml") and len(path.parts) < 2:
        raise ConfigError(f"no config is named {name_or_path!r}; {hint} (a path ends in .yaml)")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {hint}") from error
