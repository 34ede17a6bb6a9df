"""Which weights are chosen: exactly the ones that were planted, by hand-made magnitudes and differences."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_llama

from dso.editing.localise import (
    EditingError,
    editable,
    magnitude_masks,
    mask_based,
    number_of,
    pair,
    random_places,
    value_based,
)
from dso.editing.make import where

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
PLANTED = {UP: {3: 0.9, 100: -0.7}, DOWN: {0: 0.8, 17: -0.1, 511: 0.3}}  # flat index -> how much is added


@pytest.fixture
def target():
    return tiny_llama()


@pytest.fixture
def reference(target):
    other = copy.deepcopy(target)
    with torch.no_grad():
        for name, changes in PLANTED.items():
            flat = other.get_parameter(name).view(-1)
            for index, change in changes.items():
                flat[index] += change
        other.model.embed_tokens.weight[5, 5] += 9.0  # neither embeddings nor norms are looked at
        other.model.norm.weight[0] += 9.0
    return other


def lists(places):
    return {name: index.tolist() for name, index in places.items()}


def test_the_linear_layers_of_the_decoder_are_editable_and_nothing_else(target):
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = [f"model.layers.{layer}.{kind}.weight" for layer in (0, 1) for kind in kinds]
    assert list(editable(target)) == expected


def test_an_untied_head_is_not_editable():
    model = tiny_llama()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    assert "lm_head.weight" not in editable(model)


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, {UP: [3]}),
        (2, {UP: [3], DOWN: [0]}),
        (4, {UP: [3, 100], DOWN: [0, 511]}),
        (5, {UP: [3, 100], DOWN: [0, 17, 511]}),
        (4000, {UP: [3, 100], DOWN: [0, 17, 511]}),  # there are no more differences
        (0.0005, {UP: [3], DOWN: [0]}),  # of 2 x 2,304 weights: 2
    ],
)
def test_the_k_largest_differences_are_found(target, reference, k, expected):
    assert lists(value_based(target, reference, k)) == expected


def test_only_what_both_masks_keep_is_compared(target, reference):
    keep = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in editable(target).items()}
    own, theirs = copy.deepcopy(keep), copy.deepcopy(keep)
    own[UP].view(-1)[3] = False
    theirs[DOWN].view(-1)[0] = False
    assert lists(value_based(target, reference, 2, (own, theirs))) == {UP: [100], DOWN: [511]}
    assert lists(mask_based(own, theirs)) == {UP: [3], DOWN: [0]}
    with pytest.raises(EditingError, match="both masks keep the same weights"):
        mask_based(keep, keep)


def test_masks_drop_the_smallest_weights_of_the_whole_model(target):
    with torch.no_grad():
        for number, weight in enumerate(editable(target).values()):
            weight.copy_(torch.arange(1, weight.numel() + 1).view(weight.shape) * (-1) ** number)
    # The magnitudes 1 to 128 are in all 14 weights (the smallest, k and v, are 8 x 16): the first 14 x 3 + 5 go.
    masks = magnitude_masks(target, 47 / 4608)
    dropped = {name: (~mask).flatten().nonzero()[:, 0].tolist() for name, mask in masks.items()}
    assert list(dropped.values()) == [[0, 1, 2, 3]] * 5 + [[0, 1, 2]] * 9
    assert all(mask.all() for mask in magnitude_masks(target, 0).values())


def test_a_weight_that_one_pruned_model_keeps_is_found(target):
    with torch.no_grad():
        for weight in editable(target).values():
            weight.fill_(1.0)
        target.get_parameter(UP).view(-1)[7] = 0.1
        other = copy.deepcopy(target)
        other.get_parameter(UP).view(-1)[7] = 1.0
        other.get_parameter(DOWN).view(-1)[9] = -0.1
    places = mask_based(magnitude_masks(target, 1 / 4608), magnitude_masks(other, 1 / 4608))
    assert lists(places) == {UP: [7], DOWN: [9]}


def test_random_places_are_as_many_in_each_weight(target):
    like = {UP: torch.arange(40), DOWN: torch.arange(3)}
    found = random_places(target, like)
    assert {name: len(set(index.tolist())) for name, index in found.items()} == {UP: 40, DOWN: 3}
    assert all((index[1:] > index[:-1]).all() and index[0] >= 0 and index[-1] < 512 for index in found.values())
    assert lists(found) == lists(random_places(target, like)) != lists(random_places(target, like, seed=1))


def test_where_places_sit():
    layers, kinds = where({UP: torch.arange(4), DOWN: torch.arange(2), "head.weight": torch.arange(1)})
    assert layers == {0: 4, 1: 2, -1: 1}
    assert kinds == {"up_proj": 4, "down_proj": 2, "head": 1}


def test_other_architectures_are_refused(target):
    with pytest.raises(EditingError, match="only the reference has 'model.layers.2"):
        pair(target, tiny_llama(layers=3))
    with pytest.raises(EditingError, match=r"has shape \(16, 16\) in the target and \(32, 32\) in the reference"):
        pair(target, tiny_llama(width=32))
    with pytest.raises(EditingError, match="the models do not differ"):
        value_based(target, copy.deepcopy(target))
    with pytest.raises(EditingError, match="quantised, divided or not loaded"):
        editable(copy.deepcopy(target).to("meta"))


@pytest.mark.parametrize("k", [0, -1, 1.5, 4609, float("nan")])
def test_a_number_of_weights_that_is_none_is_refused(k):
    with pytest.raises(EditingError, match="expected a share below 1 or a whole number from 1 to 4608"):
        number_of(k, 4608)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0])
def test_a_sparsity_that_is_none_is_refused(target, sparsity):
    with pytest.raises(EditingError, match="expected a share from 0 to below 1"):
        magnitude_masks(target, sparsity)
