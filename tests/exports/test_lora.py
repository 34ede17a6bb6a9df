"""Slopes as LoRA: the numbers by hand, what is kept of a dense site, and what is refused."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import tiny
from exporting import INPUT, QKV, slopes, steering_of
from tiny import tiny_llama

from dso.errors import UserError
from dso.exports.lora import lora_plan, strongest, target_modules
from dso.steering.model import Steering


def test_two_slopes_are_a_lora_of_rank_two_with_numbers_by_hand() -> None:
    model = tiny_llama()
    key = model.get_submodule(QKV[1])
    with torch.no_grad():
        key.weight.copy_(torch.arange(8 * 16).view(8, 16))  # row r holds 16 r, 16 r + 1, ...
    plan = lora_plan(steering_of(model, [INPUT], a=slopes(c3=0.5, c10=-2.0)), model)
    assert list(plan.layers) == QKV and plan.rank == 2 and not plan.offsets and not plan.left_out
    layer = plan.layers[QKV[1]]
    assert layer.a.tolist() == [[float(i == 3) for i in range(16)], [float(i == 10) for i in range(16)]]
    assert layer.b.tolist() == [[0.5 * (16 * row + 3), -2.0 * (16 * row + 10)] for row in range(8)]
    assert layer.bias is None


def test_an_offset_is_the_bias_of_b() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(QKV[2]).weight.copy_(torch.arange(8 * 16).view(8, 16))
    layer = lora_plan(steering_of(model, [INPUT], "bias", b=slopes(c1=10.0)), model).layers[QKV[2]]
    assert layer.bias.tolist() == [10.0 * (16 * row + 1) for row in range(8)]
    assert not layer.b.any() and layer.b.shape == (8, 1)


def test_a_site_with_fewer_slopes_is_padded_to_the_rank_of_the_others() -> None:
    model = tiny_llama()
    steering = steering_of(model, [r"model\.layers\.\d\.input_layernorm"], a=slopes(c0=1.0, c1=1.0, c2=1.0))
    steering.tensors()[f"{INPUT}.a"].data[1:] = 0
    plan = lora_plan(steering, model)
    layer = plan.layers[QKV[0]]
    assert layer.a.shape == (3, 16) and layer.a.sum(1).tolist() == [1, 0, 0]
    assert not layer.b[:, 1:].any()
    steering.tensors()[f"{INPUT}.a"].data[:] = 0  # none at all: still a layer, as TGI wants one in every block
    assert list(lora_plan(steering, model).layers) == list(plan.layers) and len(plan.layers) == 6


def test_kept_are_the_slopes_that_move_the_layers_behind_most() -> None:
    """|slope| x |gain of the norm| x norm of the column in all readers: 1 x 6 x 1, 4 x 1 x 1, 1 x 1 x 5, 3 x 1 x 1."""
    model = tiny_llama()
    with torch.no_grad():
        for name in QKV:
            model.get_submodule(name).weight.zero_()
        query, key = (model.get_submodule(name).weight for name in QKV[:2])
        query[0, :4] = torch.tensor([1.0, 1.0, 3.0, 0.0])
        key[0, :4] = torch.tensor([0.0, 0.0, 4.0, 1.0])  # column 2: 5 over both layers
        model.get_submodule(INPUT).weight.copy_(slopes(c0=-6.0, c1=1.0, c2=1.0, c3=1.0))
    steering = steering_of(model, [INPUT], a=slopes(c0=1.0, c1=4.0, c2=-1.0, c3=3.0))
    kept = {}
    for count in (1, 2, 3, 4):
        part = strongest(steering, model, {INPUT: QKV}, count)
        kept[count] = part.tensors()[f"{INPUT}.a"].nonzero().flatten().tolist()
    assert kept == {1: [0], 2: [0, 2], 3: [0, 1, 2], 4: [0, 1, 2, 3]}
    plan = lora_plan(steering, model, rank=2)
    assert (plan.rank, plan.cut) == (2, 2)
    assert steering.tensors()[f"{INPUT}.a"].count_nonzero() == 4  # the one that was given is as it was


def test_the_gain_of_gemmas_norm_is_one_plus_its_weight() -> None:
    model = tiny("Gemma2")
    with torch.no_grad():
        for name in QKV:
            model.get_submodule(name).weight.fill_(1.0)
        model.get_submodule(INPUT).weight.zero_()
        model.get_submodule(INPUT).weight[0] = -1.0  # a gain of 0
    part = strongest(steering_of(model, [INPUT], a=slopes(c0=100.0, c1=1.0)), model, {INPUT: QKV}, 1)
    assert part.tensors()[f"{INPUT}.a"].nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(
    ("architecture", "changes", "site", "reason"),
    [
        ("Llama", {"tie_word_embeddings": True}, "model.norm", "has the weight of model.embed_tokens; --tied-head"),
        ("Gemma2", {}, "model.layers.0.post_attention_layernorm", "no linear layer reads it"),
        ("OLMo2", {}, "model.layers.1.post_feedforward_layernorm", "no linear layer reads it"),
        ("Mixtral", {}, "model.layers.0.post_attention_layernorm", "reads it"),
        ("Qwen3", {}, "model.layers.0.self_attn.q_norm", "no linear layer reads it"),
        ("Llama", {}, "model.layers.0.self_attn.q_proj", "it is a linear layer itself"),
    ],
)
def test_what_no_linear_layer_can_hold_is_refused_by_name(
    architecture: str, changes: dict, site: str, reason: str
) -> None:
    model = tiny(architecture, **changes)
    other = "model.norm" if architecture == "OLMo2" else INPUT
    whole = steering_of(model, [re.escape(site), re.escape(other)], a=torch.tensor(0.1))
    with pytest.raises(UserError, match=f"1 of 2 sites cannot be a LoRA: '{site}' .*{reason}.*--allow-partial"):
        lora_plan(whole, model)
    plan = lora_plan(whole, model, allow_partial=True)
    assert list(plan.left_out) == [site] and list(plan.steering.config.sites) == [other]


def test_an_untied_head_takes_the_final_norm() -> None:
    model = tiny("Llama")
    plan = lora_plan(steering_of(model, [r"model\.norm"], a=slopes(c0=1.0)), model)
    assert list(plan.layers) == ["lm_head"]
    assert torch.equal(plan.layers["lm_head"].b[:, 0], model.lm_head.weight[:, 0])


def test_what_cannot_be_exported_is_one_line() -> None:
    model = tiny_llama()
    affine = steering_of(model, [INPUT], "affine", a=slopes(c0=1.0), b=slopes(c0=1.0))
    with pytest.raises(UserError, match="1 sites have an offset.*--allow-partial"):
        lora_plan(affine, model, offsets=False)
    plan = lora_plan(affine, model, offsets=False, allow_partial=True)
    assert plan.left_out == {INPUT: "its offset has no place"} and not plan.offsets
    assert not plan.steering.tensors()[f"{INPUT}.b"].any()
    with pytest.raises(UserError, match="are zero; there is nothing to export"):
        lora_plan(steering_of(model, [INPUT]), model)
    with pytest.raises(UserError, match="no site can be a LoRA: lm_head, which reads it"):
        lora_plan(steering_of(model, [r"model\.norm"], a=slopes(c0=1.0)), model, allow_partial=True)
    other = tiny_llama()
    other.get_submodule(INPUT).weight.data.fill_(2.0)
    with pytest.raises(UserError, match="weights of module .* are not the ones trained on"):
        lora_plan(steering_of(model, [INPUT], a=slopes(c0=1.0)), other)
    low = Steering.for_model(model, operator="low_rank", rank=3, sites=[INPUT])
    low.tensors()[f"{INPUT}.u"].data.fill_(0.1)
    with pytest.raises(UserError, match="operators have rank 3; only slopes can be cut to 2"):
        lora_plan(low, model, rank=2)


def test_layers_are_named_by_their_last_segment_where_that_says_enough() -> None:
    model = tiny_llama()
    assert target_modules(dict.fromkeys(QKV), model) == QKV  # the second layer's are not meant
    both = [name.replace(".0.", f".{layer}.") for layer in (0, 1) for name in QKV]
    assert target_modules(dict.fromkeys(both), model) == ["k_proj", "q_proj", "v_proj"]
