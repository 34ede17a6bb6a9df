"""``dso train CONFIG --dry-run``: everything that a run will be, said before anything is loaded.

The config is resolved, the decisions are read if their files are there, the model is built without weights
(:mod:`launch.estimate.architecture`), sites and coefficients are counted and memory is estimated
(:mod:`launch.estimate.estimate`). No weight is touched, nothing is written, the network is not asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from dso.decisions.decision import DecisionError, DecisionSet
from dso.decisions.sets import SETS
from dso.models.vision import IMAGE_MEMORY
from launch.cluster.processes import read_deepspeed
from launch.config.schema import ConfigError, TrainConfig
from launch.estimate.architecture import Architecture, load_architecture
from launch.estimate.estimate import (
    LIVE,
    Batch,
    Coefficients,
    Launch,
    Memory,
    batch,
    coefficients,
    host_references,
    memory,
)
from launch.run.session import open_decisions, split_of

CARDS = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB of memory of common accelerators
GB = 1e9


class Counts:
    """Decisions of each split: counted, or as many as the config says it keeps at most, or not known (None).

    Attributes:
        decisions: the set; None if its files are not there.
        missing: what is not there.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.missing = _missing(config)
        self.decisions: DecisionSet | None = None if self.missing else open_decisions(config)
        self._kept: dict[str, int] = dict((config.data.options.get("hold_out") or {}).get("keep") or {})

    @property
    def training(self) -> DecisionSet | None:
        """The training split."""
        return self.decisions and self.decisions.select(split="train")

    @property
    def trained(self) -> int | None:
        """Decisions that training draws from."""
        split = "train"
        if self.config.train.unambiguous:
            return self.together(split)
        return self.of(split, "ambiguous")

    def of(self, split: str, kind: str) -> int | None:
        """Decisions of a kind in a split."""
        if self.decisions is None:
            return self._kept.get(split)
        return sum(d.split == split and d.kind == kind for d in self.decisions)

    def together(self, split: str) -> int | None:
        """Decisions of both kinds that a run asks."""
        if self.decisions is not None:
            return len(split_of(self.config, self.decisions, split))
        most = self._kept.get(split)
        return None if most is None else 2 * most


def dry_run(config: TrainConfig, *, name: str, deepspeed: str | None = None, ranks: int = 1) -> str:
    """The table of a run.

    Args:
        name: of the run's folder where the config names none.
        deepspeed: DeepSpeed's configuration, a JSON file.
        ranks: processes, one an accelerator.

    Raises:
        UserError: as training would raise it, as far as it can be known without weights.
    """
    launch = _launch(config, deepspeed, ranks)
    counts = Counts(config)
    architecture = load_architecture(config.model.name, config.model.revision, config.model.dtype)
    learned = coefficients(config, architecture)
    part = batch(config, architecture, counts.training, launch)
    validated = counts.together("validation")
    needed = memory(config, architecture, learned, part, launch, validated)
    tokens = f"{needed.step.tokens} tokens in {part.layout} rows ({part.source})"
    texts = f" and {part.texts} anchor texts" if part.texts else ""
    rows = [
        ("run", str(Path(config.run.output_dir) / (config.run.run_name or name))),
        ("model", _model(architecture)),
        ("steering", _steering(config, architecture, learned)),
        ("files", f"steering {_size(learned.checkpoint)}; state to go on from, about {_size(5 * 4 * learned.count)}"),
        *data_rows(config, counts),
        *_training(config, counts, launch),
        ("each process", f"{part.size} decisions{texts} at a time, {tokens}"),
        ("exchanged", f"{_size(4 * learned.count)} of gradients a step" if launch.ranks > 1 else "nothing"),
        *_host(architecture, counts.trained, part, launch),
    ]
    return "\n".join([*lines(rows), "", *_table(config, needed, launch), ""])


def lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """What a dry run says, a line a row."""
    width = max(len(key) for key, _ in rows)
    return ["dry run: no weights are read, nothing is written", *(f"{key:<{width}}  {value}" for key, value in rows)]


def _launch(config: TrainConfig, deepspeed: str | None, ranks: int) -> Launch:
    zero = read_deepspeed(deepspeed, config, ranks)["zero_optimization"] if deepspeed else {}
    decisions, shares = config.decisions, ranks * config.train.gradient_accumulation_steps
    if decisions < shares:
        reason = f"a step of {decisions} decisions cannot be divided into {shares} shares"
        raise ConfigError(f"{reason}; raise it, or start fewer processes", "train.ambiguous")
    live = zero.get("stage3_max_live_parameters", LIVE)
    return Launch(ranks, int(zero.get("stage", 0)), config.train.gradient_accumulation_steps, int(live))


def _missing(config: TrainConfig) -> str | None:
    """The file or folder of the decisions that is not there."""
    data = config.data
    jsonl = data.set.endswith(".jsonl")
    path = data.set if jsonl else data.options.get("path")
    if path is None or Path(str(path)).expanduser().exists():
        return None
    if not jsonl and data.set not in SETS:
        raise DecisionError(f"unknown decision set {data.set!r}. Known are {', '.join(SETS)}, or a .jsonl file")
    return str(path)


def _model(architecture: Architecture) -> str:
    kind = type(architecture.model).__name__
    return f"{kind}, {architecture.parameters:,} parameters in {_dtype(architecture)} ({architecture.source})"


def _dtype(architecture: Architecture) -> str:
    return str(architecture.model.dtype).removeprefix("torch.")


def _steering(config: TrainConfig, architecture: Architecture, learned: Coefficients) -> str:
    widths = sorted(set(learned.sites.values()))
    share = learned.count / architecture.parameters
    kind = config.steering.operator + (f" of rank {config.steering.rank}" if config.steering.rank else "")
    names = list(learned.sites)
    return (
        f"{kind} at {len(names)} sites of width {', '.join(map(str, widths))} ({names[0]} ... {names[-1]}): "
        f"{learned.count:,} coefficients, {share:.4%} of the model's parameters"
    )


def data_rows(config: TrainConfig, counts: Counts) -> Iterable[tuple[str, str]]:
    """What is decided: the set, and how many decisions each split has."""
    data = config.data
    note = f"; {counts.missing} is not there, so numbers are those that the config states" if counts.missing else ""
    yield "decisions", f"{data.set}{note}"
    for split in ("train", "validation", "test"):
        most = "at most " if counts.missing else ""
        numbers = {kind: counts.of(split, kind) for kind in ("ambiguous", "unambiguous")}
        said = [f"{kind} not known" if n is None else f"{most}{n} {kind}" for kind, n in numbers.items()]
        yield f"  {split}", ", ".join(said)


def _training(config: TrainConfig, counts: Counts, launch: Launch) -> Iterable[tuple[str, str]]:
    train, evaluation = config.train, config.evaluation
    step = train.ambiguous + train.unambiguous
    there = counts.of("train", "ambiguous")
    rounds = f", {train.max_steps * train.ambiguous / there:.1f} times the ambiguous ones" if there else ""
    yield (
        "training",
        f"{train.estimator}, {train.max_steps} steps x {step} decisions ({train.ambiguous} ambiguous, "
        f"{train.unambiguous} unambiguous) = {train.max_steps * step:,}{rounds}",
    )
    if train.optimizer.fisher_batches:
        measured = train.optimizer.fisher_batches * step
        yield "before it", f"{train.optimizer.fisher_batches} batches to measure steps in KL, {measured:,} decisions"
    times = 1 + math.ceil(train.max_steps / evaluation.eval_steps)
    validated = counts.together("validation")
    yield "validation", f"{times} times {number(validated)} decisions"
    scales = {0.0, *evaluation.scales}
    tested = counts.together("test")
    yield "test", f"{len(scales)} scales x {number(tested)} decisions"
    sharing = f"ZeRO-{launch.stage}" if launch.ranks > 1 or launch.stage else "no launcher"
    parts = f", each share in {launch.parts} parts" if launch.parts > 1 else ""
    yield "processes", f"{launch.ranks} ({sharing}{parts})"


def _host(architecture: Architecture, trained: int | None, part: Batch, launch: Launch) -> Iterable[tuple[str, str]]:
    kept = ["references of the training prompts, whose number is not known"]
    if trained is not None:
        size = _size(host_references(architecture, part, trained))
        texts = f", {len(part.anchors)} anchor texts" if part.anchors else ""
        kept = [f"up to {size} of references ({trained} training prompts{texts})"]
    if part.sight.tower_bytes:
        kept.append(f"{_size(IMAGE_MEMORY)} of images")
    size = _size(architecture.weight_bytes)
    loading = f"{size} while loading, then " if launch.stage < 3 else ""  # which takes a tensor at a time
    yield "host memory", f"of each process: {loading}{', '.join(kept)}"


def _table(config: TrainConfig, needed: Memory, launch: Launch) -> Iterable[str]:
    step = needed.step
    share = "" if step.share == 1 else f", scaled up from {step.share:.0%} of it"
    validated = needed.references or 0
    rows: list[tuple[str, int, int, str]] = [
        ("backbone weights", needed.weights, needed.weights, "exact" if launch.stage < 3 else "a share of them"),
        ("gathered weights", needed.gathered, needed.gathered, "at most"),
        ("operators, optimiser", needed.state, needed.state, "six float32 numbers a coefficient"),
        ("activations", step.kept, step.checkpointed, f"what autograd saves, counted without numbers{share}"),
        ("backward pass", needed.backward, needed.backward, "crude: a layer's and the answers' gradients"),
        ("vision tower", needed.tower, needed.tower, "crude; on top of what earlier passes keep"),
        ("validation references", validated, validated, "a row of the vocabulary an answer position"),
        ("measuring", needed.evaluation, needed.evaluation, "crude; between steps, not on top of one"),
        ("accelerator's context", needed.context, needed.context, "crude"),
    ]
    yield f"{'GB of accelerator memory':<26}{'plain':>8}{'checkpointed':>14}"
    for title, plain, checkpointed, note in rows:
        if plain or checkpointed:
            yield f"{title:<26}{plain / GB:>8.2f}{checkpointed / GB:>14.2f}  {note}"
    totals = [needed.total(checkpointing) for checkpointing in (False, True)]
    yield f"{'at most at one time':<26}{totals[0] / GB:>8.2f}{totals[1] / GB:>14.2f}"
    yield f"{'smallest card':<26}{_card(totals[0]):>8}{_card(totals[1]):>14}"
    if needed.references is None:
        yield "validation references are not in it, as the number of decisions is not known"
    column = "checkpointed" if config.train.gradient_checkpointing else "plain"
    yield f"this run is {column} (train.gradient_checkpointing); GB are 10^9 bytes"


def _card(total: int) -> str:
    """With a tenth to spare, as estimates and allocators are not exact."""
    return next((f"{size} GB" for size in CARDS if total * 1.1 <= size * GB), "none")


def number(value: int | None) -> str:
    """A count as people read it."""
    return "an unknown number of" if value is None else f"{value:,}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
