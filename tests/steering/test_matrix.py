"""Every architecture passes every check, and the table in the docs says so (``python tests/helpers/matrix.py`` writes
it)."""

from __future__ import annotations

import re

import pytest
from cases import CASES
from matrix import CHECKS, TABLE, check, committed, render


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("column", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_every_architecture(name: str, column: str) -> None:
    assert check(CASES[name], column) == committed()[name][column]


def test_the_table_holds_every_architecture_and_its_own_words() -> None:
    assert list(committed()) == list(CASES)
    texts = [TABLE.read_text(encoding="utf-8"), render(committed())]
    one, other = (re.sub(r"(transformers|torch) \d[\w.]*", r"\1", text) for text in texts)
    assert one == other  # but for the versions that it was written with
    assert not [cell for row in committed().values() for cell in row.values() if "fail" in cell]
