"""What a run on free-form answers leaves: the steering with its evidence, the answers themselves, tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dso.evaluation.answers import AnswerEvaluator, Answers
from dso.evaluation.card import model_card
from dso.evaluation.figure import scale_figure
from dso.evaluation.report import ScalePoint, clean, contexts_table, markdown_rows, markdown_table
from dso.files import write_text
from dso.models.embedded import HUB_IDS
from launch.run.answer_session import AnswerSession
from launch.run.measure import scale_point

SHOWN = 12  # decisions whose answers the report shows
HOW = (
    "Numbers are of sampled answers, read by a matcher of words: bias is of the frequencies of the people that were "
    "named (log-odds are not measured, as a frequency may be 0), accuracy is the share of answers that name the right "
    "person, mass the share that names anybody, relative to the base model. KL is in nats a token, mean over an "
    "answer's tokens."
)


def answer_point(
    scale: float,
    answers: Answers,
    evaluator: AnswerEvaluator,
    target: dict[str, float] | None,
    bootstrap: int,
    base: Answers | None = None,
) -> ScalePoint:
    """What was said at one scale, as evidence; ``base`` is what was said at scale 0, for the cut."""
    before = None if base is None else base.measurement
    point = scale_point(scale, answers.measurement, evaluator.decisions, target, bootstrap, before)
    return replace(point, accuracy=evaluator.accuracy(answers))


def abstention_lines(points: Sequence[ScalePoint]) -> str:
    """How often nobody is named, a line a scale."""
    return "\n".join(f"scale {p.scale:.2f}: {p.bias.abstention:.3f} of the answers name nobody" for p in points)


def write_results(
    session: AnswerSession,
    folder: Path,
    evaluator: AnswerEvaluator,
    said: Sequence[Answers],
    points: Sequence[ScalePoint],
    seconds: float,
) -> None:
    """The steering with its card, the curve, the picture, the answers and the report."""
    config, steering = session.config, session.steering
    split = "test"
    curve = [point.to_json(contexts=False) for point in points]
    steering.config = replace(steering.config, scale_curve=tuple(curve))
    data = (
        f"{evaluator.samples} answers of up to {evaluator.max_new_tokens} tokens, sampled at temperature "
        f"{evaluator.temperature:g}, to each of {len(evaluator.asked)} decisions of the split {split} of "
        f"{config.data.set}; rule of the matcher: {session.matcher.rule}"
    )
    card = model_card(
        steering.config,
        points,
        name=folder.name,
        data=data,
        training=_training(session, seconds),
        source=str(folder / "steering"),
        base_model=HUB_IDS.get(config.model.name),
        kl_budget=config.constraints.kl_budget,
        limits=(HOW, "The matcher looks at words, not at meaning; a sample of what it read is in the run's report."),
    )
    steering.save_pretrained(folder / "steering", card)
    write_text(folder / "curve.json", json.dumps([point.to_json() for point in points], indent=1))
    write_text(folder / "answers.jsonl", _answers_jsonl(evaluator, said, points))
    scale_figure(points, folder / "curve.png", config.constraints.kl_budget, title=f"{folder.name}: {split}")
    parts = [
        f"# {folder.name}\n",
        f"Measured on: {data}\n",
        HOW + "\n",
        markdown_table(points),
        abstention_lines(points) + "\n",
        "![curve](curve.png)\n",
        contexts_table(points[0].bias, points[-1].bias, markdown=True),
        "Some answers, and whom they were read to name:\n",
        _shown(evaluator, said, points),
    ]
    write_text(folder / "report.md", "\n".join(parts))


def _training(session: AnswerSession, seconds: float) -> dict[str, object]:
    config, train = session.config, session.config.train
    return {
        "decision set": f"{config.data.set}, split train",
        "estimator": train.estimator,
        "steps x decisions": f"{train.max_steps} x {config.decisions}",
        "answers a decision": train.freeform.num_generations,
        "KL budget (nats a token)": config.constraints.kl_budget,
        "seed": train.seed,
        "processes": session.world.size,
        "seconds": round(seconds),
    }


def _answers_jsonl(evaluator: AnswerEvaluator, said: Sequence[Answers], points: Sequence[ScalePoint]) -> str:
    """Every answer: a line a decision and scale, with the group that each was read to name."""
    lines = []
    for answers, point in zip(said, points, strict=True):
        for decision, texts in zip(evaluator.asked, answers.texts, strict=True):
            groups = [evaluator.matcher.group(text, decision) for text in texts]
            record = {"id": decision.id, "scale": point.scale, "answers": list(texts), "groups": groups}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def _shown(evaluator: AnswerEvaluator, said: Sequence[Answers], points: Sequence[ScalePoint]) -> str:
    step = max(1, len(evaluator.asked) // SHOWN)
    rows = [("context", "scale", "answer", "names")]
    for place in range(0, len(evaluator.asked), step):
        decision = evaluator.asked[place]
        for answers, point in ((said[0], points[0]), (said[-1], points[-1])):
            text = answers.texts[place][0]
            named = evaluator.matcher.match(text, decision)
            name = "-" if named is None else decision.candidates[named].text.strip()
            rows.append(
                (clean(decision.context), f"{point.scale:g}", clean(text.strip().replace("\n", " ")), clean(name))
            )
    return markdown_rows(rows)
