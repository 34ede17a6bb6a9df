"""Fixtures on tiny models (helpers/tiny.py): nothing is downloaded and a forward pass takes a millisecond."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once; two on a core wait for each other most of the time

import pytest
from tiny import byte_tokenizer, small_set, tiny_llama

from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone

# Files that take longest, which the two workers begin with, so that none is left to one of them at the end.
LONGEST = (
    "launching/test_kill.py", "training/test_tracking_wandb.py", "training/test_distributed.py",
    "training/test_distributed_launcher.py", "launching/test_cli.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest = [Path(__file__).parent / name for name in LONGEST]
    items.sort(key=lambda item: longest.index(item.path) if item.path in longest else len(longest))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def backbone() -> Backbone:
    return Backbone(tiny_llama(), byte_tokenizer(), "tiny")


@pytest.fixture
def decisions() -> DecisionSet:
    return small_set()
