"""Fixtures on tiny models (helpers/tiny.py): nothing is downloaded and a forward pass takes a millisecond."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch reads it once; two on a core wait for each other most of the time

import pytest
from tiny import byte_tokenizer, small_set, tiny_llama

from dso.decisions.decision import DecisionSet
from dso.models.backbone import Backbone


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
