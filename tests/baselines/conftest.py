"""What the tests of trained baselines share."""

from __future__ import annotations

import pytest
from fair_task import Clock

from dso.baselines import learning


@pytest.fixture
def clock(monkeypatch) -> None:
    """Training's seconds are looks at the clock, two a step."""
    monkeypatch.setattr(learning, "monotonic", Clock())
