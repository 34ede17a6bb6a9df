"""Measuring decisions by what the model says to them: sampled free-form answers, and what a run keeps of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dso.decisions.decision import DecisionSet
from dso.decisions.matching import Matcher
from dso.evaluation.answers import AnswerEvaluator, Answers
from dso.evaluation.report import ScalePoint, clean, markdown_rows
from dso.files import write_text
from dso.models.backbone import Backbone
from dso.steering.handle import Handle
from launch.config.schema import TrainConfig
from launch.run.measure import cut_points
from trainers.parallel.ranks import World

ANSWERS = "answers.jsonl"  # of a run
SHOWN = 12  # decisions whose answers the report shows
HOW = (
    "Numbers are of sampled answers, read by a matcher of words: bias is of the frequencies of the people that were "
    "named (log-odds are not measured, as a frequency may be 0), accuracy is the share of answers that name the right "
    "person, mass the share that names anybody, relative to the base model. KL is in nats a token, mean over an "
    "answer's tokens."
)


class FreeformAnswers:
    """See :class:`launch.run.measure.Measures`.

    Args:
        config: of the run: how answers are sampled, and the target.
        backbone, decisions, matcher, handle, progress: see :class:`dso.evaluation.answers.AnswerEvaluator`.
        world: the processes that share the work.
    """

    limits: tuple[str, ...] = (
        HOW,
        "The matcher looks at words, not at meaning; a sample of what it read is in the run's report.",
    )

    def __init__(
        self,
        config: TrainConfig,
        backbone: Backbone,
        decisions: DecisionSet,
        matcher: Matcher,
        handle: Handle | None,
        world: World,
        progress: Callable[[int], None] | None = None,
    ):
        train = config.train
        self._target = config.data.target
        self._said: list[Answers] = []
        self._evaluator = AnswerEvaluator(
            backbone,
            decisions,
            matcher,
            handle,
            samples=config.evaluation.samples,
            max_new_tokens=train.freeform.max_completion_length,
            temperature=train.freeform.temperature,
            seed=train.seed,
            progress=progress,
            rank=world.rank,
            size=world.size,
            add=world.all_sum,
        )
        self.what = (
            f"{config.evaluation.samples} answers of up to {train.freeform.max_completion_length} tokens, sampled at "
            f"temperature {train.freeform.temperature:g} and read by the matcher's rule {matcher.rule!r}, to each of "
            f"{len(decisions)} decisions"
        )

    def points(self, scales: Sequence[float], bootstrap: int) -> list[ScalePoint]:
        """See :meth:`launch.run.measure.Measures.points`."""
        evaluator = self._evaluator
        self._said = [evaluator.measure(scale) for scale in scales]
        measured = [said.measurement for said in self._said]
        points = cut_points(scales, measured, evaluator.decisions, self._target, bootstrap)
        return [
            replace(point, accuracy=evaluator.accuracy(said)) for point, said in zip(points, self._said, strict=True)
        ]

    def example(self) -> str:
        """One of the answers that were sampled last."""
        texts = (text for answers in self._said[-1].texts for text in answers if text.strip())
        return next(texts, "").strip()

    def write(self, folder: Path, points: Sequence[ScalePoint]) -> list[str]:
        """See :meth:`launch.run.measure.Measures.write`: every answer, with the group that it was read to name."""
        evaluator, lines = self._evaluator, []
        for said, point in zip(self._said, points, strict=True):
            for decision, texts in zip(evaluator.asked, said.texts, strict=True):
                groups = [evaluator.matcher.group(text, decision) for text in texts]
                record = {"id": decision.id, "scale": point.scale, "answers": list(texts), "groups": groups}
                lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_text(folder / ANSWERS, "".join(lines))
        return ["Some answers, and whom they were read to name:\n", self._shown(points)]

    def _shown(self, points: Sequence[ScalePoint]) -> str:
        asked, matcher = self._evaluator.asked, self._evaluator.matcher
        rows = [("context", "scale", "answer", "names")]
        for place in range(0, len(asked), max(1, len(asked) // SHOWN)):
            decision = asked[place]
            for said, point in ((self._said[0], points[0]), (self._said[-1], points[-1])):
                text = said.texts[place][0]
                named = matcher.match(text, decision)
                name = "-" if named is None else decision.candidates[named].text.strip()
                answer = text.strip().replace("\n", " ")
                rows.append((clean(decision.context), f"{point.scale:g}", clean(answer), clean(name)))
        return markdown_rows(rows)


def explained(points: Sequence[ScalePoint]) -> str:
    """What is said beside a table of such figures: how often nobody is named, a line a scale, and what they are."""
    rows = [f"scale {p.scale:.2f}: {p.bias.abstention:.3f} of the answers name nobody" for p in points]
    return "\n".join([*rows, HOW])
