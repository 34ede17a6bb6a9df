"""Train and measure a steering on free-form answers: ``dso train CONFIG`` where the config names GRPO or RLOO.

A run is one folder: ``config.yaml`` (every value), ``metrics.jsonl``, ``times.jsonl`` (what the clock says), ``state/``
(to go on from), ``validation.json``, ``steering/`` (what is shipped), ``answers.jsonl`` (what was said),
``curve.json``, ``curve.png`` and ``report.md``.

Under ``accelerate launch``, ``torchrun`` and ``deepspeed`` every process samples its share of the answers and learns
whom the others' answers name; gradients are averaged by torch or by DeepSpeed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from dso.evaluation.answers import AnswerEvaluator, Answers
from dso.evaluation.report import ScalePoint, scale_table
from dso.steering.model import Steering
from launch.config.schema import TrainConfig
from launch.run import constants
from launch.run.answer_learn import learn
from launch.run.answer_report import HOW, abstention_lines, answer_point, write_results
from launch.run.answer_session import AnswerSession, open_answers, open_world, require_trl
from launch.run.folder import Resume, on_main
from launch.run.opening import opened
from launch.run.train import Result
from trainers.parallel.ranks import World


def train(
    config: TrainConfig,
    *,
    name: str,
    resume: Resume = False,
    overwrite: bool = False,
    quiet: bool = False,
    deepspeed: str | None = None,
) -> Result:
    """Train on sampled answers, keep the best steering inside the constraints, measure what is said before and after.

    Args:
        name: of the run's folder where the config names none.
        resume: go on from the folder's last saved state; "auto" starts the run if there is none.
        overwrite: drop an existing run of that name.
        quiet: print nothing but the result.
        deepspeed: path of DeepSpeed's configuration, for runs of a launcher.

    Raises:
        UserError: if the config or the folder cannot be used; an existing run is as it was then.
        Stopped: on Ctrl-C and SIGTERM; what was learned is kept.
    """
    require_trl()
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "quiet": quiet, "deepspeed": deepspeed}
    with opened(config, open_world, open_answers, name=name, **options) as (session, plan, stop, tracker, world):
        quiet = quiet or not world.is_main
        seconds = learn(session, plan, stop, tracker, quiet)
        evaluator, said, points = measure(session, quiet)
        on_main(world, lambda: write_results(session, plan.folder, evaluator, said, points, seconds))
        tracker.results(points, [], plan.folder / "steering")
    return Result(plan.folder, points)


def measure(
    session: AnswerSession, quiet: bool = False, scales: Sequence[float] | None = None
) -> tuple[AnswerEvaluator, list[Answers], list[ScalePoint]]:
    """What is said at the scales given, or else at 0 and those of the config, on the first test split."""
    config = session.config
    split = "test"
    decisions = session.split(split, config.evaluation.test_stride)
    scales = sorted({0.0, *config.evaluation.scales}) if scales is None else scales
    hidden = quiet or not sys.stderr.isatty()
    if not quiet and hidden:
        print(f"asking {len(decisions)} decisions of {split} at {len(scales)} scales", file=sys.stderr)
    with tqdm(total=len(decisions) * len(scales), desc="ask", unit="decision", disable=hidden) as bar:
        evaluator = session.evaluator(decisions, bar.update)
        said = [evaluator.measure(scale) for scale in scales]
    base = next((answers for scale, answers in zip(scales, said, strict=True) if scale == 0), None)
    points = [
        answer_point(scale, answers, evaluator, config.data.target, constants.RESAMPLES, base if scale else None)
        for scale, answers in zip(scales, said, strict=True)
    ]
    return evaluator, said, points


def measured(config: TrainConfig, source: str, quiet: bool = False) -> str:
    """What is said with a trained steering, or without one, as tables; nothing is written.

    Args:
        source: folder or Hub id of a steering, whatever it was trained by; "none" for the base model alone.

    Raises:
        UserError: if the config, the steering or the model cannot be used.
    """
    bare = source == "none"
    steering = None if bare else Steering.from_pretrained(source)
    session = open_answers(config, World(), steering=steering)
    _, _, points = measure(session, quiet, [0.0] if bare else None)
    return "\n".join([scale_table(points), abstention_lines(points), HOW])


def report(result: Result) -> str:
    """What a finished run prints."""
    folder = result.folder
    return "\n".join(
        [
            scale_table(result.points),
            abstention_lines(result.points),
            HOW,
            f"answers   {folder / 'answers.jsonl'}",
            f"report    {folder / 'report.md'}",
            f"steering  {folder / 'steering'}   (dso generate {folder / 'steering'} --scale 0.5 PROMPT)",
        ]
    )
