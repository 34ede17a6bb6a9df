"""``dso train CONFIG --dry-run`` where free-form answers are trained: what the run will sample, said without a model.

How much memory it takes is not estimated: that depends on how long the model's answers are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from launch.cluster.processes import micro_batch, read_deepspeed
from launch.config.schema import TrainConfig
from launch.estimate.dryrun import Counts, data_rows, lines, number
from launch.run.trainer import open_matcher
from trainers.answers import divide


def dry_run(config: TrainConfig, *, name: str, deepspeed: str | None = None, ranks: int = 1) -> str:
    """The rows of a run.

    Args:
        name: of the run's folder where the config names none.
        deepspeed: DeepSpeed's configuration, a JSON file.
        ranks: processes, one an accelerator.

    Raises:
        UserError: as training would raise it, as far as it can be known without the model.
    """
    if deepspeed:
        read_deepspeed(deepspeed, config, ranks)
    open_matcher(config)
    counts = Counts(config)
    own, passes = divide(config.decisions, config.train.freeform.num_generations, ranks, micro_batch(config, ranks))
    rows = [
        ("run", str(Path(config.run.output_dir) / (config.run.run_name or name))),
        ("model", f"{config.model.name} in {config.model.dtype}"),
        *data_rows(config, counts),
        *_sampling(config, counts),
        (
            "each process",
            f"{own} answers of a step at a time, {passes} times" if passes > 1 else f"{own} answers a step",
        ),
        ("processes", str(ranks)),
    ]
    return "\n".join([*lines(rows), ""])


def _sampling(config: TrainConfig, counts: Counts) -> Iterator[tuple[str, str]]:
    train, evaluation = config.train, config.evaluation
    step = config.decisions * train.freeform.num_generations
    yield (
        "training",
        f"{train.estimator}, {train.max_steps} steps x {config.decisions} decisions ({train.ambiguous} ambiguous, "
        f"{train.unambiguous} unambiguous) x {train.freeform.num_generations} answers = {train.max_steps * step:,} "
        f"answers of up to {train.freeform.max_completion_length} tokens",
    )
    if train.optimizer.fisher_batches:
        measured = train.optimizer.fisher_batches * config.decisions
        yield "before it", f"{train.optimizer.fisher_batches} batches to measure steps in KL, {measured:,} decisions"
    times = 1 + math.ceil(train.max_steps / evaluation.eval_steps)
    validated = counts.together("validation")
    yield "validation", f"{times} times {number(validated)} decisions x {evaluation.samples} answers"
    scales = {0.0, *evaluation.scales}
    tested = counts.together("test")
    yield "test", f"{len(scales)} scales x {number(tested)} decisions x {evaluation.samples} answers"
