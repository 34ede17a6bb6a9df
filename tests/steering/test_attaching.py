"""Who is attached to a model, and the models that a steering meets: copied, compiled, wrapped, offloaded, quantised."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from steered import INPUT, logits, moved
from tiny import byte_tokenizer, tiny_llama
from torch import nn

from dso import Steering, attached, detach_all
from dso.models.backbone import Backbone
from dso.steering.config import SteeringError


@pytest.fixture
def model():
    return tiny_llama()


# ---------------------------------------------------------------- who is attached


def test_the_handles_on_a_model_are_found_and_taken_off(model):
    base, one, other = logits(model), moved(model, 1), moved(model, 2)
    assert attached(model) == []
    first = one.attach(model)
    second = other.attach(model, 0.3)
    assert attached(model) == [first, second]
    assert [handle.steering for handle in attached(model)] == [one, other]
    assert attached(model.model.norm) == [first, second] and attached(model.lm_head) == []
    del first, second  # lost
    detach_all(model)
    assert attached(model) == [] and torch.equal(logits(model), base)
    detach_all(model)


def test_the_same_steering_is_not_attached_twice(model):
    base, steering = logits(model), moved(model)
    handle = steering.attach(model)
    once = logits(model)
    with pytest.raises(SteeringError, match=r"on the model already; set the scale of its handle .*detach_all"):
        steering.attach(model)
    assert torch.equal(logits(model), once)
    handle.detach()
    assert torch.equal(logits(model), base)
    with steering.on(model):
        assert torch.equal(logits(model), once)


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_steered_model_is_the_base_model(model, way):
    base, steering = logits(model), moved(model)
    with steering.on(model):
        steered = logits(model)
        if way == "deepcopy":
            twin = copy.deepcopy(model)
        elif way == "pickle":
            twin = pickle.loads(pickle.dumps(model))
        else:
            torch.save(model, kept := io.BytesIO())
            kept.seek(0)
            twin = torch.load(kept, weights_only=False)
        assert torch.equal(logits(twin), base) and attached(twin) == []
        assert torch.equal(logits(model), steered)
    with steering.on(twin):
        assert torch.equal(logits(twin), steered)
    assert torch.equal(logits(twin), base)


# ---------------------------------------------------------------- compiled


@pytest.mark.parametrize("way", ["model.compile()", "torch.compile(model)"])
def test_a_model_that_was_compiled_before_is_steered_and_restored(model, way):
    steering, base = moved(model), logits(model)
    with steering.on(model):
        wanted = logits(model)
    fast = model
    if way == "model.compile()":
        model.compile(backend="eager")
    else:
        fast = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(fast), base, atol=1e-5, rtol=1e-5)
    with steering.on(fast):
        torch.testing.assert_close(logits(fast), wanted, atol=1e-5, rtol=1e-5)
        assert attached(model) == attached(fast) != []
    torch.testing.assert_close(logits(fast), base, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_a_compiled_model_decodes_steered_with_every_kind_of_cache(model, cache):
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    steering, base = moved(model), model.generate(INPUT, use_cache=False, **options)
    with steering.on(model):
        wanted = model.generate(INPUT, use_cache=False, **options)
    model.compile(backend="eager")
    with steering.on(model):
        found = model.generate(INPUT, cache_implementation=cache, **options)
    torch.compiler.reset()
    assert torch.equal(found, wanted) and not torch.equal(wanted, base)


def test_a_compiled_part_of_a_model_is_steered(model):
    steering = moved(model)
    with steering.on(model):
        wanted = logits(model)
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert list(Steering.for_model(model).config.sites) == list(steering.config.sites)
    with steering.on(model):
        torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


# ---------------------------------------------------------------- wrapped


class DistributedDataParallel(nn.Module):
    """Holds the model as torch's class of that name does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(ids)


class Adapted(nn.Module):
    """Holds the model as PEFT's classes do."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model

    def get_base_model(self):
        return self.base_model.model

    def forward(self, ids):
        return self.base_model.model(ids)


@pytest.mark.parametrize(
    "wrap", [DistributedDataParallel, Adapted, torch.compile], ids=["data parallel", "adapter", "compiled"]
)
def test_sites_have_the_names_of_the_plain_model(model, wrap):
    plain = moved(model)
    with plain.on(model):
        wanted = logits(model)
    wrapped = wrap(model)
    assert Steering.for_model(wrapped).config == plain.config
    with plain.on(wrapped):
        torch.testing.assert_close(logits(model), wanted)


def test_an_adapters_layer_is_known_by_the_layer_it_adapts(model):
    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.base_layer, self.lora_A = layer, nn.Linear(16, 2, bias=False)
            self.in_features, self.out_features = layer.in_features, layer.out_features

        def forward(self, hidden):
            return self.base_layer(hidden)

    steering = Steering.for_model(model, sites=[".*q_proj"])
    layer = model.model.layers[0].self_attn
    layer.q_proj = type("Linear", (Adapter,), {})(layer.q_proj)
    handle = steering.attach(model)
    assert attached(model) == [handle]


# ---------------------------------------------------------------- offloaded and quantised


@pytest.mark.parametrize("sites", [["norms"], ["attention"]])
def test_an_offloaded_model_is_steered(model, sites):
    accelerate = pytest.importorskip("accelerate")
    steering = moved(model, sites=sites)
    with steering.on(model):
        wanted = logits(model)
    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    with steering.on(offloaded):
        torch.testing.assert_close(logits(offloaded), wanted, atol=1e-5, rtol=1e-5)


def test_weights_that_are_not_loaded_cannot_be_compared(model):
    steering = moved(model)
    with pytest.raises(SteeringError, match=r"'model.layers.0.input_layernorm' are not loaded .*check=False"):
        steering.attach(model.to("meta"))


def test_a_quantised_model_is_steered_at_its_norms_and_refused_where_weights_cannot_be_compared(model):
    norms, projections = moved(model), moved(model, sites=["attention"])
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    base = logits(quantised)
    for steering, options in ((norms, {}), (projections, {"check": False})):
        with steering.on(quantised, **options):
            assert not torch.equal(logits(quantised), base)
        assert torch.equal(logits(quantised), base)
    with pytest.raises(SteeringError, match=r"'model.layers.0.self_attn.q_proj' is quantised, .*check=False"):
        projections.attach(quantised)


# ---------------------------------------------------------------- scales


def test_a_scale_that_was_set_in_inference_mode_can_be_trained_with(model):
    steering = moved(model)
    handle = steering.attach(model, 0.2)
    with torch.inference_mode():
        handle.scale = 0.4
        logits(model)
    model(INPUT).logits.sum().backward()
    assert all(value.grad is not None for value in steering.parameters())


def test_a_scale_reads_back_as_it_was_set(model):
    with moved(model).on(model, 0.4) as handle:
        assert handle.scale == 0.4
        handle.scale = 1
        assert handle.scale == 1.0 and isinstance(handle.scale, float)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 2}])
def test_each_prompt_keeps_its_scale_where_it_has_several_rows(model, options):
    backbone, steering = Backbone(model, byte_tokenizer(), "tiny"), moved(model)
    options |= {"max_new_tokens": 4, "pad_token_id": 0, "output_scores": True, "return_dict_in_generate": True}
    seen = {}
    for scale in (0.0, 1.0):
        torch.manual_seed(0)
        with steering.on(backbone.model, scale):
            seen[scale] = model.generate(INPUT, **options).scores[0]
    with steering.on(backbone.model, torch.tensor([0.0, 1.0])):
        torch.manual_seed(0)
        mixed = model.generate(INPUT, **options).scores[0]
    rows = len(mixed) // 2
    torch.testing.assert_close(mixed[:rows], seen[0.0][:rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[rows:], seen[1.0][rows:], atol=1e-4, rtol=1e-4)


def test_scales_must_divide_the_batch(model):
    with (
        moved(model).on(model, torch.tensor([0.1, 0.2, 0.3])),
        pytest.raises(SteeringError, match="3 scales for a"),
    ):
        logits(model)


# ---------------------------------------------------------------- groups


def test_groups_without_a_target_are_to_be_equiprobable(model, tmp_path, capsys):
    from launch.cli import main

    steering = Steering.for_model(model, groups=("a", "b", "c", "d"))
    assert steering.config.target == (0.25, 0.25, 0.25, 0.25)
    steering.save_pretrained(tmp_path / "s")
    assert main(["inspect", str(tmp_path / "s")]) == 0
    assert "fair shares  a 0.25, b 0.25, c 0.25, d 0.25" in capsys.readouterr().out
