"""Tasks of lm-evaluation-harness on the steered model object: MMLU, GPQA, IFEval, or any other of its names.

Nothing is rewritten: ``HFLM(pretrained=model)`` takes the model as it is, hooks and scale included, and the harness
asks and scores. Per-document scores are taken from its samples, so base and steered are compared pairwise; a figure
that is no mean of these is shown as the harness gives it, without an interval. Data on a hub are downloaded; what
cannot be fetched fails with one line. Tasks of your own are YAML files in a folder, as the harness documents them.
"""

from __future__ import annotations

import difflib
import io
import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dso.errors import UserError, first_line
from dso.evaluation.benchmarks.figures import Figure, mean_figure
from dso.evaluation.benchmarks.probe import Probe
from dso.evaluation.benchmarks.task import FigureTask
from dso.evaluation.twoway import Part

INSTALL = "lm-evaluation-harness is not installed: pip install 'dso[harness]'"
ROWS = 8  # of a batch


class HarnessTask(FigureTask[dict[str, Any]]):
    """One task of the harness; its answers are what ``simple_evaluate`` returns.

    Args:
        name: the harness's.
        folder: with YAML files of further tasks.
        limit: documents.

    Raises:
        UserError: if the harness is not installed, or knows no such task.
    """

    def __init__(self, name: str, folder: Path | None = None, limit: int | None = None):
        self.name, self.limit = name, limit
        self.items = self.asks = 0  # the harness finds out, and has bars of its own
        self.manager = _manager(folder)
        if name not in self.manager.all_tasks:
            near = difflib.get_close_matches(name, self.manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"lm-evaluation-harness has no task {name!r}{hint}")

    def ask(self, probe: Probe) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        backbone = probe.backbone
        try:
            with _quiet():
                model = HFLM(pretrained=backbone.model, tokenizer=backbone.tokenizer, batch_size=ROWS)
                found = simple_evaluate(
                    model=model, tasks=[self.name], limit=self.limit, task_manager=self.manager, bootstrap_iters=0
                )
        except ImportError as error:
            raise UserError(f"harness task {self.name!r} needs another package: {first_line(error)}") from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"harness task {self.name!r} cannot be run: {first_line(error)}") from error
        assert found is not None  # it is on the first process
        self.items = sum(count["effective"] for count in found["n-samples"].values())
        return found

    def figures(self, answers: dict[str, Any]) -> list[Figure]:
        found = []
        for task, scores in answers["results"].items():
            samples = answers.get("samples", {}).get(task, [])
            for key, value in scores.items():
                metric, _, rule = key.partition(",")
                if not isinstance(value, int | float) or metric.endswith("_stderr") or not rule:
                    continue
                found.append(_figure(f"{task}, {metric}", metric, rule, float(value), samples))
        return found


@cache
def _manager(folder: Path | None) -> Any:
    """What knows the harness's tasks, which takes seconds to read them all."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(INSTALL) from error
    return TaskManager(include_path=str(folder) if folder else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep advice and attempts to connect out of our output, and bars where no one watches."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _figure(name: str, metric: str, rule: str, value: float, samples: list[dict[str, Any]]) -> Figure:
    """A mean of the samples' scores where it is one, else a number whose noise is not known."""
    scores = [s.get(metric) for s in samples if s.get("filter", rule) == rule]
    if scores and all(isinstance(score, int | float) for score in scores):
        places = np.argsort([s["doc_id"] for s in samples if s.get("filter", rule) == rule], kind="stable")
        values = np.array(scores, dtype=np.float64)[places]
        if math.isclose(values.mean(), value, rel_tol=1e-6, abs_tol=1e-9):
            return mean_figure(name, values, range(len(values)))
    return Figure(name=name, part=Part(np.array([value]), np.full((1, 1), np.nan), 0.0), items=len(samples))
