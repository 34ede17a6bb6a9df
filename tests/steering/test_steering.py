"""Steering: what a scale does, that 0 does nothing at all, and that a model is left as it was found."""

from __future__ import annotations

import copy
import math

import pytest
import steered
import torch
from architectures import tiny, tokens
from tiny import tiny_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.handle import Handle
from dso.steering.model import Steering

KINDS = {"affine": None, "scale": None, "bias": None, "low_rank": 2}
INPUT = torch.tensor([tokens(5, 1), tokens(5, 2), tokens(5, 3)])


@pytest.fixture
def model():
    return tiny_llama()


def moved(model: nn.Module, operator: str = "affine", seed: int = 0, **facts) -> Steering:
    """A steering with random coefficients."""
    return steered.moved(model, seed, operator=operator, rank=KINDS[operator], **facts)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = INPUT) -> Tensor:
    return model(ids).logits


class Steered(nn.Module):
    """A norm with its operator written out: the reference that hooks must equal."""

    def __init__(self, norm: nn.Module, tensors: dict[str, Tensor], scale: float):
        super().__init__()
        self.norm, self.tensors, self.scale = norm, tensors, scale

    def forward(self, hidden: Tensor) -> Tensor:
        h, t = self.norm(hidden), self.tensors
        added = t["b"].expand_as(h) if "b" in t else torch.zeros_like(h)
        if "a" in t:
            added = added + t["a"] * h
        if "u" in t:
            added = added + torch.einsum("ir,jr,btj->bti", t["u"], t["v"], h)
        return h + self.scale * added


def written_out(model: nn.Module, steering: Steering, scale: float) -> nn.Module:
    model = copy.deepcopy(model)
    for site in steering.config.sites:
        parent, _, name = site.rpartition(".")
        named = {key.rpartition(".")[2]: v for key, v in steering.tensors().items() if key.rpartition(".")[0] == site}
        setattr(model.get_submodule(parent), name, Steered(model.get_submodule(site), named, scale))
    return model


# ---------------------------------------------------------------- what a scale does


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("operator", KINDS)
def test_the_hooks_equal_operators_written_out(model, operator, scale):
    steering = moved(model, operator)
    wanted = logits(written_out(model, steering, scale))
    assert (wanted - logits(model)).abs().max() > 0.1
    with steering.on(model, scale):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)


def test_a_fresh_steering_is_the_identity(model):
    base = logits(model)
    for operator, rank in KINDS.items():
        with Steering.for_model(model, operator=operator, rank=rank).on(model):
            assert torch.equal(logits(model), base)


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Gemma3", "OPT", "Qwen3", "Falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_0_is_the_base_model_bit_for_bit(architecture, dtype):
    model = tiny(architecture).to(dtype)
    base = logits(model)
    steering = moved(model)
    with steering.on(model, 0.0) as handle:
        assert torch.equal(logits(model), base)
        handle.scale = 1.0
        assert not torch.equal(logits(model), base)
        handle.scale = torch.tensor(0)
        assert torch.equal(logits(model), base)
        handle.scale = -0.0
        assert torch.equal(logits(model), base)
        handle.scale = torch.zeros(len(INPUT))
        assert torch.equal(logits(model), base)


def test_scale_0_does_not_even_compute(model):
    steering = moved(model)
    next(iter(steering.tensors().values())).data.fill_(torch.nan)
    base = logits(model)
    with steering.on(model, 0.0) as handle:
        assert torch.equal(logits(model), base)
        handle.scale = torch.tensor([0.0, 1.0, 0.0])
        found = logits(model)
    assert torch.equal(found[[0, 2]], base[[0, 2]])
    assert found[1].isnan().all()


@pytest.mark.parametrize("operator", KINDS)
def test_each_row_has_its_own_scale(model, operator):
    steering = moved(model, operator)
    base = logits(model)
    wanted = []
    for row, scale in enumerate((0.0, 0.4, 1.0)):
        with steering.on(model, scale):
            wanted.append(logits(model, INPUT[row : row + 1]))
    with steering.on(model, torch.tensor([0.0, 0.4, 1.0])):
        found = logits(model)
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0], base[0])  # a row of scale 0 in the same batch, to the bit


def test_the_scale_is_live(model):
    steering = moved(model)
    wanted = {}
    for scale in (0.2, 0.8):
        with steering.on(model, scale):
            wanted[scale] = logits(model)
    handle = steering.attach(model)
    for scale in (0.8, 0.2, 0.8):
        handle.scale = scale
        assert handle.scale == pytest.approx(scale)
        assert torch.equal(logits(model), wanted[scale])
    rows = torch.tensor([0.1, 0.2, 0.3])
    handle.scale = rows
    assert torch.equal(handle.scale, rows)
    handle.detach()


def test_the_scale_is_a_copy_on_both_sides(model):
    given = torch.tensor([0.1, 0.2, 0.3])
    with moved(model).on(model, given) as handle:
        given.fill_(torch.nan)
        handle.scale.fill_(torch.nan)
        assert handle.scale.tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_half_precision_is_steered_in_float32():
    model = tiny("Llama")
    steering = moved(model)
    seen = {}
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, output: seen.update(plain=output))
    half = model.to(torch.bfloat16)
    with steering.on(half, 0.5):  # bfloat16 holds these weights exactly: the same fingerprint
        norm.register_forward_hook(lambda module, args, output: seen.update(steered=output))
        logits(half)
    a, b = (steering.tensors()[f"model.norm.{key}"].detach() for key in "ab")
    h = seen["plain"].double()
    wanted = (h + 0.5 * (a.double() * h + b.double())).float().to(torch.bfloat16)
    assert seen["steered"].dtype == torch.bfloat16
    assert torch.equal(seen["steered"], wanted)


# ---------------------------------------------------------------- the model is left as it was


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_detach_restores_and_is_idempotent(model):
    base, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    modules, buffers = dict(model.named_modules()), dict(model.named_buffers())
    handle = moved(model).attach(model)
    assert hooks(model) == 5 + 1  # one at each norm, one that watches caches
    assert list(model.state_dict()) == list(state)
    assert dict(model.named_modules()) == modules
    assert not torch.equal(logits(model), base)
    handle.detach()
    handle.detach()
    assert hooks(model) == 0
    assert torch.equal(logits(model), base)
    assert dict(model.named_modules()) == modules and dict(model.named_buffers()) == buffers
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    handle.scale = 0.5  # harmless


def test_an_error_in_the_block_restores_the_model(model):
    base = logits(model)
    with pytest.raises(KeyError, match="mine"), moved(model).on(model):
        raise KeyError("mine")
    assert hooks(model) == 0
    assert torch.equal(logits(model), base)


def test_an_error_in_the_forward_pass_leaves_it_usable(model):
    base = logits(model)
    with moved(model).on(model, torch.tensor([0.1, 0.2])) as handle:
        with pytest.raises(SteeringError, match="2 scales for a batch of 3 at site 'model.layers.0.input_layernorm'"):
            logits(model)
        handle.scale = 0.0
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("error", [RuntimeError("hooks are full"), KeyboardInterrupt()])
def test_attach_rolls_back_when_a_hook_cannot_be_registered(model, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    steering = moved(model)
    monkeypatch.setattr(model.get_submodule("model.norm"), "register_forward_hook", fail)  # the last of five
    with pytest.raises(type(error)):
        steering.attach(model)
    assert hooks(model) == 0


def test_a_bad_scale_attaches_nothing(model):
    with pytest.raises(SteeringError):
        moved(model).attach(model, 7)
    assert hooks(model) == 0


def test_two_steerings_compose_and_detach_by_themselves(model):
    first, second = moved(model, seed=1), moved(model, "low_rank", seed=2)
    base = logits(model)
    with second.on(model, 0.5):
        second_alone = logits(model)
    both = logits(written_out(written_out(model, first, 0.7), second, 0.5))
    one = first.attach(model, 0.7)
    other = second.attach(model, 0.5)
    torch.testing.assert_close(logits(model), both, atol=1e-5, rtol=1e-5)
    one.detach()
    assert torch.equal(logits(model), second_alone)
    other.detach()
    assert torch.equal(logits(model), base)


class InPlace(TorchDispatchMode):
    """Records the operations that write in place."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            self.found.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_nothing_is_written_in_place(model):
    norm, steering = model.model.norm, moved(model, sites=["model.norm"])
    plain = {}
    norm.register_forward_hook(lambda module, args, output: plain.update(output=output, copy=output.clone()))
    with steering.on(model), InPlace() as mode:
        logits(model)
    assert torch.equal(plain["output"], plain["copy"])
    assert mode.found == []


# ---------------------------------------------------------------- gradients


def gradients(model: nn.Module, steering: Steering, scale: float = 0.6) -> dict[str, Tensor]:
    steering.zero_grad()
    with steering.on(model, scale):
        model(INPUT).logits.log_softmax(-1)[..., 7].sum().backward()
    return {key: value.grad.clone() for key, value in steering.tensors().items()}


@pytest.mark.parametrize("operator", KINDS)
def test_gradients_reach_the_operators_and_nothing_else(model, operator):
    model.requires_grad_(False)
    steering = moved(model, operator)
    found = gradients(model, steering)
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in steering.tensors().items():
        assert found[key].abs().sum() > 0, key
        # Against the slope of the loss, in one coefficient of each tensor.
        flat, step = value.data.view(-1), 1e-2
        ends = []
        for sign in (1, -1):
            flat[0] += sign * step
            with steering.on(model, 0.6):
                ends.append(logits(model).double().log_softmax(-1)[..., 7].sum().item())
            flat[0] -= sign * step
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found[key].view(-1)[0].item() == pytest.approx(slope, rel=0.02, abs=0.02), key


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Gemma2"])
def test_gradient_checkpointing_gives_equal_gradients(architecture, reentrant):
    settings = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} if architecture == "GPT-2" else {}
    model = tiny(architecture, **settings).requires_grad_(False).train()
    steering = moved(model)
    wanted = gradients(model, steering)
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    model.get_submodule(list(steering.config.sites)[0]).register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, steering)
    assert len(calls) == 2  # once forward, once again for the backward pass
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- generation and compilation


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.7, torch.tensor([0.0, 0.4, 1.0])], ids=["one scale", "one a row"])
@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Gemma2", "Qwen3"])
def test_generation_with_a_cache_equals_generation_without(architecture, scale):
    model = tiny(architecture)
    options = {
        "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(INPUT),
        "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    with moved(model).on(model, scale):
        cached, whole = (model.generate(INPUT, use_cache=use, **options) for use in (True, False))
        again = logits(model, cached.sequences)
    assert torch.equal(cached.sequences, whole.sequences)
    for step, (one, other) in enumerate(zip(cached.logits, whole.logits, strict=True)):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one, again[:, INPUT.shape[1] - 1 + step], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_compiled_model_is_steered_and_a_change_of_scale_compiles_nothing():
    model, compiled = tiny_llama(layers=1), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    steering = moved(model)
    wanted = {}
    for scale in (0.2, 0.5, 0.9):
        with steering.on(model, scale):
            wanted[scale] = logits(model)
    base = logits(model)
    handle = steering.attach(model, 0.2)
    torch.compiler.reset()
    fast = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(fast), wanted[0.2], atol=1e-5, rtol=1e-5)
    count = len(compiled)
    assert count > 0
    for scale in (0.5, 0.9, 0.2):
        handle.scale = scale
        torch.testing.assert_close(logits(fast), wanted[scale], atol=1e-5, rtol=1e-5)
    assert len(compiled) == count
    handle.scale = 0.0  # the base model is another graph
    torch.testing.assert_close(logits(fast), base, atol=1e-5, rtol=1e-5)
    off = len(compiled)
    for scale in (0.9, 0.0):  # from here on both are known
        handle.scale = scale
        logits(fast)
    assert len(compiled) == off
    handle.detach()
    torch.compiler.reset()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (math.nan, "scale is nan, expected a number from 0 to 1"),
        (math.inf, "scale is inf, expected a number from 0 to 1"),
        (1.01, "scale is 1.01, expected a number from 0 to 1, the range this steering states"),
        (-0.01, "scale is -0.01"),
        (torch.tensor([0.5, math.nan, 0.5]), "scale is nan"),
        (torch.tensor([0.5, 2.0, 0.5]), "scale is 2,"),
        (torch.zeros(2, 2), r"scale has shape \(2, 2\), expected a number or one value a batch row"),
        (torch.zeros(0), r"scale has shape \(0,\)"),
        ("much", "scale is 'much', expected a number or one value a batch row"),
        (None, "scale is None"),
    ],
)
def test_scales_that_cannot_be_set(model, scale, message):
    with moved(model).on(model, 0.25) as handle:
        before = logits(model)
        with pytest.raises(SteeringError, match=message):
            handle.scale = scale
        assert handle.scale == 0.25
        assert torch.equal(logits(model), before)


def test_the_stated_range_is_inclusive_in_any_precision(model):
    for low, high in ((0.0, 1.2), (-0.7, 0.3), (-1 / 3, 2 / 3)):
        with moved(model, scale_range=(low, high)).on(model, high) as handle:
            handle.scale = low
            handle.scale = torch.tensor([low, high, 0.0])
            for beyond in (high + 1e-3, low - 1e-3):
                with pytest.raises(SteeringError, match="expected a number from"):
                    handle.scale = beyond


def refused(model: nn.Module, steering: Steering, message: str) -> None:
    before = hooks(model)
    with pytest.raises(SteeringError, match=message):
        steering.attach(model)
    assert hooks(model) == before


def test_a_model_of_other_weights_is_refused(model):
    steering = moved(model, base_model="owner/name")
    other = tiny_llama()
    other.model.layers[1].input_layernorm.weight.data[3] += 0.01
    refused(other, steering, "weights of module 'model.layers.1.input_layernorm' are not the .* made for owner/name")
    other = tiny_llama(seed=7)  # norms start at one whatever the seed: what they hold is all that is compared
    steering.attach(other).detach()


def test_a_model_of_another_width_or_other_site_names_is_refused(model):
    steering = moved(model)
    refused(
        tiny_llama(width=32), steering, "'model.layers.0.input_layernorm' has width 32, expected 16; .* another mod"
    )
    refused(tiny_llama(layers=1), steering, "no module 'model.layers.1.input_layernorm'")
    refused(tiny("GPT-2"), steering, "the model has no module 'model.layers.0.input_layernorm'")


def test_a_site_must_give_one_tensor(model):
    class Pair(nn.Module):
        def forward(self, hidden):
            return hidden, hidden

    model.model.norm = Pair()
    steering = Steering(SteeringConfig(sites={"model.norm": 16}))
    with steering.on(model), pytest.raises(SteeringError, match="site 'model.norm' gives a tuple, expected one tensor"):
        model(INPUT)


def test_tensors_must_be_exactly_those_of_the_sites(model):
    steering = moved(model)
    tensors = {key: value.detach().clone() for key, value in steering.tensors().items()}
    assert list(tensors)[:3] == [
        "model.layers.0.input_layernorm.a",
        "model.layers.0.input_layernorm.b",
        "model.layers.0.post_attention_layernorm.a",
    ]
    fresh = Steering.for_model(model)
    short = {key: value for key, value in tensors.items() if key != "model.norm.b"}
    for wrong, message in (
        (short, "'model.norm.b' is missing from the steering's tensors"),
        (tensors | {"model.norm.c": torch.zeros(16)}, "'model.norm.c' is unknown in"),
        (tensors | {"model.norm.b": torch.zeros(15)}, r"'model.norm.b' has shape \(15,\), expected \(16,\)"),
    ):
        with pytest.raises(SteeringError, match=message):
            fresh.load_tensors(wrong)
        assert all(value.abs().sum() == 0 for value in fresh.tensors().values())
    fresh.load_tensors(tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in fresh.tensors().items())


def test_operators_follow_the_activation_to_its_device(model):
    # The meta device stands in for an accelerator: tensors of two devices do not mix.
    steering = moved(model, sites=["model.norm"])
    handle = Handle(steering, model, {"model.norm": model.model.norm}, 0.5)
    model.to("meta")
    assert model(INPUT.to("meta")).logits.shape == (3, 5, 258)
    assert [p.device.type for p in steering.parameters()] == ["meta", "meta"]
    handle.scale = torch.tensor([0.1, 0.2, 0.3])
    assert model(INPUT.to("meta")).logits.shape == (3, 5, 258)
