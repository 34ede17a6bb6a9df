"""Neutral texts: what a steering does to the next token after them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_runs import make_trainer

from dso.decisions.sets.roles import occupations
from dso.errors import UserError
from dso.evaluation.neutral import SHIPPED, NeutralTexts, anchor_texts, neutral_texts
from tools.bench.harm import prose


def test_kl_is_that_of_the_next_token_against_the_base_model() -> None:
    trainer = make_trainer()
    task, steering = trainer.task, trainer.policy.steering
    texts = ["a b", "b a c", "c"]
    neutral = NeutralTexts(task.backbone, texts)
    assert neutral.kl() == 0
    base = task.backbone.next_token(texts)
    generator = torch.Generator().manual_seed(0)
    for value in steering.tensors().values():
        value.data.copy_(0.3 * torch.randn(value.shape, generator=generator))
    now = task.backbone.next_token(texts)
    by_hand = sum(float((row.exp() * (row - own)).sum()) for row, own in zip(now, base, strict=True)) / 3
    assert by_hand > 1e-4
    assert neutral.kl() == pytest.approx(by_hand, rel=1e-4)


def test_texts_that_ship_are_many_and_about_no_one() -> None:
    for texts in (neutral_texts(), [text for text in anchor_texts("shipped") if not {"he", "she"} & words_of(text)]):
        assert len(texts) == len(set(texts)) > 100
        words = {word for text in texts for word in words_of(text)}
        assert not words & {"he", "she", "his", "her", "him", "man", "woman", "boy", "girl", "mr", "mrs"}
    assert SHIPPED.name in {path.name for path in SHIPPED.parent.iterdir()}


def test_anchors_say_of_nobody_in_particular_what_he_and_she_did_alike() -> None:
    """Held as they are, they keep a pronoun from drifting where no job is named."""
    of_him, of_her = (
        [re.sub(rf"\b{pronoun}\b", "they", text) for text in anchor_texts("shipped") if pronoun in words_of(text)]
        for pronoun in ("he", "she")
    )
    assert of_him == of_her
    assert len(set(of_him)) == len(of_him) > 10
    jobs = "|".join((*occupations(), *occupations(held_out=True)))
    assert not [text for text in of_him if re.search(rf"\b({jobs})\b", text)]  # of two words, too
    words = {word for text in of_him for word in words_of(text)}
    assert not words & {"his", "her", "him", "hers", "man", "woman", "boy", "girl", "mr", "mrs"}


def words_of(text: str) -> set[str]:
    return {word.lower().strip(".,;?") for word in text.split()}


def test_a_file_of_ones_own_replaces_them(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("One text\n\n  another \n", encoding="utf-8")
    assert neutral_texts(str(path)) == ["One text", "another"]
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(UserError, match="has no neutral texts; write one a line"):
        neutral_texts(str(path))
    with pytest.raises(UserError, match="neutral texts cannot be read"):
        neutral_texts(str(tmp_path / "none.txt"))


def test_anchors_are_whole_texts_that_no_figure_is_measured_on(tmp_path: Path) -> None:
    shipped = anchor_texts("shipped")
    questions = [text for text in shipped if "?" in text]
    assert len(shipped) / 2 < len(questions) < len(shipped)  # the others are sentences
    assert all("?" in text.rstrip("?") for text in questions)  # each asks, and goes on to answer
    beginnings = Counter(
        re.match(r'(Question: |Q: |User: |"|\d+\. |)', text).group().strip("0123456789") for text in questions
    )
    assert len(beginnings) == 6, "forms"
    assert max(beginnings.values()) <= len(questions) / 3
    assert all(text[0].isupper() and text.endswith(".") for text in shipped if text not in questions)
    assert not set(prose()) & set(shipped)
    assert not {line for text in shipped for line in text.split("\n")} & set(neutral_texts())
    path = tmp_path / "own.txt"
    path.write_text("One text\\nof two lines\n\nanother\n", encoding="utf-8")
    assert anchor_texts(str(path)) == ["One text\nof two lines", "another"]
    assert anchor_texts(None) == []
    with pytest.raises(UserError, match="anchor texts cannot be read"):
        anchor_texts(str(tmp_path / "none.txt"))
