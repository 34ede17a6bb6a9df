"""The null: random directions."""

from __future__ import annotations

import pytest
import torch
from steered import moved
from tiny import tiny_llama

from dso.baselines.random_directions import random_like


def test_random_directions_are_as_long_as_those_they_stand_beside() -> None:
    model = tiny_llama()
    steering = moved(model, operator="low_rank", rank=2)
    first, again, other = (random_like(steering, seed).tensors() for seed in (1, 1, 2))
    for name, value in steering.tensors().items():
        assert first[name].norm() == pytest.approx(float(value.detach().norm()), rel=1e-5)
        assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    random_like(steering, 1).attach(model, 40.0).detach()  # beyond the scales that the steering states


def test_where_a_steering_does_nothing_random_ones_do_nothing() -> None:
    steering = moved(tiny_llama(), operator="scale")
    site = next(iter(steering.operators))
    steering.operators[site].a.data.zero_()
    assert not random_like(steering, 0).operators[site].a.any()
