"""PEFT's adapters as candidates: exact scales, and a model that is as it was once they are off."""

from __future__ import annotations

import pytest
import torch
from fair_task import tiny_task
from tiny import tiny_llama

from dso.baselines import adapters
from dso.baselines.adapters import Adapter
from dso.baselines.baseline import BaselineError
from dso.evaluation.evaluator import Evaluator
from dso.evaluation.neutral import NeutralTexts

KINDS = {
    "lora": {"r": 2, "lora_alpha": 6, "target_modules": "all-linear"},
    "ln_tuning": {"target_modules": ["model.layers.0.input_layernorm", "model.norm"]},
}
IDS = torch.tensor([[5, 9, 60, 200, 31]])


def trained(kind: str) -> Adapter:
    """An adapter with weights of its own, as if it had been trained."""
    adapter = Adapter(kind, **KINDS[kind])
    handle = adapter.attach(tiny_llama())
    generator = torch.Generator().manual_seed(1)
    adapter.tensors = {
        name: torch.randn(value.shape, generator=generator) for name, value in sorted(handle.tensors().items())
    }
    return adapter


def shape_of(model: torch.nn.Module) -> list[tuple]:
    return [(name, id(module), type(module)) for name, module in model.named_modules()]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_scale_0_and_detaching_are_the_base_model_bit_for_bit(kind: str) -> None:
    model = tiny_llama().requires_grad_(False)
    before, modules, weights = model(IDS).logits, shape_of(model), dict(model.named_parameters())
    handle = trained(kind).attach(model, 0.0)
    assert torch.equal(model(IDS).logits, before)
    handle.scale = 1.0
    moved = model(IDS).logits
    assert (moved - before).abs().max() > 0.1
    handle.scale = 0.0
    assert torch.equal(model(IDS).logits, before)
    handle.scale = 1.0
    assert torch.equal(model(IDS).logits, moved) and handle.scale == 1.0
    handle.detach()
    handle.detach()
    assert torch.equal(model(IDS).logits, before)
    assert shape_of(model) == modules and not hasattr(model, "peft_config")
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys() and all(after[name] is weights[name] for name in weights)
    assert not any(p.requires_grad for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_scale_of_a_lora_is_that_of_its_change_of_the_weights(scale: float) -> None:
    """alpha / r is 3: a layer that is given W x gives (W + 3 s B A) x."""
    model = tiny_llama()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    weight = model.model.layers[1].self_attn.v_proj.weight.clone()
    adapter = trained("lora")
    adapter.attach(model, scale)
    name = "model.layers.1.self_attn.v_proj.lora_{}.default.weight"
    a, b = (adapter.tensors[name.format(part)] for part in "AB")
    wanted = x @ (weight + scale * 3 * b @ a).T
    torch.testing.assert_close(model.model.layers[1].self_attn.v_proj(x), wanted, rtol=1e-5, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_scale_of_ln_tuning_interpolates_the_weights_of_a_norm(scale: float) -> None:
    model = tiny_llama()
    model.model.norm.weight += 0.25
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    own = model.model.norm(x) / 1.25
    adapter = trained("ln_tuning")
    adapter.attach(model, scale)
    tuned = adapter.tensors["model.norm.ln_tuning_layers.default.weight"]
    torch.testing.assert_close(model.model.norm(x), own * (1.25 + scale * (tuned - 1.25)))


@pytest.mark.parametrize(("baseline", "rate", "value"), [
    (adapters.LORA, "LORA_RATE", 0.02), (adapters.LN_TUNING, "NORM_RATE", 0.05),
])  # fmt: skip
def test_what_is_proposed_is_fairer_and_leaves_the_model_alone(baseline, rate, value, monkeypatch, clock) -> None:
    monkeypatch.setattr(adapters, rate, value)
    task = tiny_task(seconds=80.0)  # of the test's clock
    model = task.backbone.model
    modules, drawn = shape_of(model), torch.random.get_rng_state()
    (candidate,) = baseline.propose(task)
    assert shape_of(model) == modules and torch.equal(torch.random.get_rng_state(), drawn)
    handle = candidate.steering.attach(model)
    assert not any(p.requires_grad for p in model.parameters())
    base, steered = Evaluator(task.backbone, task.decisions, handle).curve([0.0, 1.0])
    handle.detach()
    free = [d.ambiguous for d in task.decisions]
    assert base.kl.tolist() == [0.0] * len(free) and steered.kl.min() > 0
    torch.testing.assert_close(torch.from_numpy(base.policy), task.base.exp())
    assert abs(steered.policy[free, 0] - 0.5).mean() < 0.8 * abs(base.policy[free, 0] - 0.5).mean()


def test_a_model_without_a_place_and_a_second_adapter_are_refused() -> None:
    model = tiny_llama()
    with pytest.raises(BaselineError, match="PEFT's lora has no place in this model: .*nowhere"):
        Adapter("lora", r=2, target_modules=["nowhere"]).attach(model)
    handle = trained("lora").attach(model)
    with pytest.raises(BaselineError, match="the model has an adapter of PEFT already; take it off first"):
        trained("ln_tuning").attach(model)
    handle.detach()
    trained("ln_tuning").attach(model).detach()


@torch.no_grad()
def test_neutral_texts_are_held_against_the_base_model_while_an_adapter_is_on() -> None:
    backbone = tiny_task().backbone
    texts = ["The river is", "In winter, "]
    before = backbone.next_token(texts)
    handle = trained("lora").attach(backbone.model)
    after = backbone.next_token(texts)
    wanted = float((after.exp() * (after - before)).sum(-1).mean())
    assert wanted > 0.01
    assert NeutralTexts(backbone, texts).kl(handle) == pytest.approx(wanted, rel=1e-4)
    assert torch.equal(backbone.next_token(texts), after)
