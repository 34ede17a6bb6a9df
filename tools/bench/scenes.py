"""The embedded vision-language model: what a steering does to the association that it was trained on, and to the other.

Three sets are measured, on appearances that neither the model nor a steering was trained on: gender and occupation, the
same with occupations that no steering was trained on, and skin and place, which no steering was trained on at all. On
the last one its bias must not grow.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dso.decisions.decision import Decision, DecisionSet
from dso.decisions.sets import load_decisions
from dso.evaluation.evaluator import Evaluator
from dso.files import write_bytes
from dso.models.backbone import Backbone
from dso.steering.model import Steering
from tools.bench.sweeps import Variant, measure_all, train_all

CONFIG = "vlm-scenes"
COLUMNS, ROWS, PICTURE, LINE, EDGE = 6, 4, 128, 15, 8
BAR = 98  # of the picture's width; the number stands behind it
INK, EMPTY, BEFORE, AFTER = "#202020", "#e4e4e4", "#c44e00", "#0072b2"
LEGEND = (('probability of "left":  base', BEFORE), ("steered", AFTER))


def scenes(arguments: argparse.Namespace) -> None:
    """Train a steering a seed, measure base and steerings on the three sets, and draw the sheet of the first one."""
    folders = train_all(CONFIG, [Variant("gender", ())], arguments)
    gender = load_decisions("scenes", splits=["test", "test-contexts"])
    sets = {split: gender.select(split=split) for split in gender.splits}
    sets["skin"] = load_decisions("scenes", association="skin", splits=["test"])
    for label, data in sets.items():
        measure_all(folders, data, label, Path(arguments.results) / f"scenes-{label}.json")
    write_sheet(Steering.from_pretrained(folders[0][2] / "steering"), sets["test"], Path(arguments.sheet))


def write_sheet(steering: Steering, decisions: DecisionSet, path: Path) -> None:
    """Pictures with a question each and the answers before and after: ambiguous ones above, unambiguous ones below."""
    chosen = [d for ambiguous in (True, False) for d in _spread(decisions, ambiguous, COLUMNS * ROWS // 2)]
    backbone = Backbone.load(steering.config.base_model)
    shown = DecisionSet(tuple(chosen), decisions.groups, decisions.name)
    with steering.on(backbone.model, 0.0) as handle:
        before, after = (m.policy for m in Evaluator(backbone, shown, handle).curve([0.0, 1.0]))
    write_bytes(path, sheet(chosen, before, after))


def _spread(decisions: DecisionSet, ambiguous: bool, count: int) -> list[Decision]:
    """Decisions about different people, the contexts in turn, the sides in turn."""
    found: list[Decision] = []
    contexts, people = decisions.contexts, set()
    kind = [d for d in decisions if d.ambiguous == ambiguous]
    while len(found) < count:
        number = len(found)
        wanted = contexts[number % len(contexts)], str((number // len(contexts) + number) % 2)
        fits = [d for d in kind if d.unit not in people and (d.context, d.id[-1]) == wanted]
        found.append((fits or [d for d in kind if d.unit not in people])[0])
        people.add(found[-1].unit)
    return found


def sheet(decisions: Sequence[Decision], before: np.ndarray, after: np.ndarray) -> bytes:
    """A PNG of the decisions' pictures, each with its question and P(left) before and after.

    Args:
        before, after: (N, 2) probabilities of the candidates left and right.
    """
    import io

    from PIL import Image, ImageDraw, ImageFont

    width, height = PICTURE + EDGE, PICTURE + 3 * LINE + EDGE
    size = COLUMNS * width + EDGE, LINE + 2 * EDGE + -(-len(decisions) // COLUMNS) * height
    whole = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(11)
    place = EDGE
    for words, colour in LEGEND:
        pen.text((place, EDGE // 2), words, INK, font)
        place += int(pen.textlength(words, font)) + EDGE
        pen.rectangle([place, EDGE // 2 + 3, place + 3 * EDGE, EDGE // 2 + 12], colour)
        place += 5 * EDGE
    pen.text((place, EDGE // 2), "in brackets: what the picture shows", INK, font)
    for number, decision in enumerate(decisions):
        x, y = EDGE + number % COLUMNS * width, LINE + EDGE + number // COLUMNS * height
        with Image.open(decision.images[0]) as picture:
            whole.paste(picture.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.NEAREST), (x, y))
        right = "" if decision.answer is None else f" ({decision.candidates[decision.answer].text})"
        pen.text((x, y + PICTURE + 1), f"{decision.context}?{right}", INK, font)
        for line, (row, colour) in enumerate(((before[number], BEFORE), (after[number], AFTER)), 1):
            top = y + PICTURE + line * LINE + 3
            pen.rectangle([x, top, x + BAR - 1, top + 9], EMPTY)
            if filled := round(BAR * row[0]):
                pen.rectangle([x, top, x + filled - 1, top + 9], colour)
            pen.text((x + BAR + 6, top - 2), f"{row[0]:.2f}", INK, font)
    data = io.BytesIO()
    whole.quantize(64, dither=Image.Dither.NONE).save(data, "PNG", optimize=True)
    return data.getvalue()
