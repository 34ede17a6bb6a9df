"""Every baseline that is fitted from activations, end to end on a tiny model."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import tiny
from baseline_task import tiny_task
from tiny import byte_tokenizer

from dso.baselines import affine_editing, caa, fairsteer, iti, leace, linear_act, projection, wring
from dso.baselines.baseline import Baseline, BaselineError
from dso.baselines.registry import BASELINES, find_baselines
from dso.models.backbone import Backbone
from dso.steering.config import SteeringError
from dso.steering.handle import unsteered

FITTED = [m.BASELINE for m in (caa, iti, linear_act, projection, leace, affine_editing, wring, fairsteer)]


@pytest.mark.parametrize("baseline", FITTED, ids=lambda baseline: baseline.name)
@torch.no_grad()
def test_each_candidate_steers_and_scale_0_is_the_base_model_bit_for_bit(baseline: Baseline) -> None:
    task = tiny_task()
    backbone, decisions = task.backbone, list(task.decisions)
    labels = []
    for candidate in baseline.propose(task):
        labels.append(candidate.label)
        handle = candidate.steering.attach(backbone.model, 0.0)
        assert torch.equal(backbone.score(decisions).policy(), task.base)
        handle.scale = 1.0
        steered = backbone.score(decisions).policy()
        assert steered.isfinite().all() and (steered - task.base).abs().max() > 1e-3
        with unsteered(backbone.model):
            assert torch.equal(backbone.score(decisions).policy(), task.base)
        handle.detach()
        assert torch.equal(backbone.score(decisions).policy(), task.base)
    assert labels and len(set(labels)) == len(labels)
    assert list(baseline.scales) == sorted(set(baseline.scales)) and baseline.scales[0] > 0 and baseline.source


def test_the_same_seed_proposes_the_same() -> None:
    first, again = (next(iter(caa.propose(tiny_task(seed=3)))).steering.tensors() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@torch.no_grad()
def test_operators_of_their_own_are_attached_as_a_steering_is() -> None:
    task = tiny_task()
    model, ids = task.backbone.model, torch.tensor([[5, 9, 33, 70], [8, 8, 40, 2]])
    base = model(ids).logits
    made = next(iter(wring.propose(task))).steering
    handle = made.attach(model, torch.tensor([0.0, 1.0]))
    rows = model(ids).logits
    assert torch.equal(rows[0], base[0]) and not torch.equal(rows[1], base[1])
    assert torch.equal(copy.deepcopy(model)(ids).logits, base)
    handle.detach()
    other = tiny_task(Backbone(tiny("GPT-2"), byte_tokenizer(), "gpt2")).backbone.model
    with pytest.raises(SteeringError, match="has no module 'model.layers.0'"):
        made.attach(other)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight += 1
    with pytest.raises(SteeringError, match="are not the ones trained on"):
        made.attach(model)


def test_an_architecture_without_a_place_is_refused_in_one_line() -> None:
    task = tiny_task(Backbone(tiny("Bloom"), byte_tokenizer(), "bloom"))
    for baseline in (caa, projection, leace, affine_editing, wring, fairsteer):
        with pytest.raises(BaselineError, match="'transformer.h.0' gives a tuple") as error:
            next(iter(baseline.propose(task)))
        assert "\n" not in str(error.value)


def test_baselines_are_found_by_name() -> None:
    names = [baseline.name for baseline in BASELINES]
    assert len(set(names)) == len(names) and find_baselines() == BASELINES
    assert find_baselines(("iti", "caa")) == (iti.BASELINE, caa.BASELINE)
    with pytest.raises(BaselineError, match="no baseline 'nothing'; known are .*caa, iti"):
        find_baselines(("nothing",))
