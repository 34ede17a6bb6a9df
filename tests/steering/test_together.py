"""Steerings at work together: several on a model, a scale a row, threads, caches, and what is kept between passes."""

from __future__ import annotations

import copy
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from steered import INPUT, logits, moved
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dso import Steering, attached
from dso.steering.config import SteeringConfig, SteeringError
from dso.steering.hooks import SiteHook, say

GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny_llama()


def frozen(model: nn.Module, seed: int = 0, **facts) -> Steering:
    """A steering as it is loaded: nothing of it is trained."""
    return moved(model, seed, **facts).requires_grad_(False)


def at(model: nn.Module, steering: Steering, scale: float) -> Tensor:
    with steering.on(model, scale):
        return logits(model)


# ---------------------------------------------------------------- several steerings


def test_steerings_act_in_the_order_in_which_they_are_attached(model):
    seen = {}
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, output: seen.update(plain=output))
    gender, race = frozen(model, 1, sites=["model.norm"]), frozen(model, 2, sites=["model.norm"])

    def by_hand(h: Tensor, steering: Steering, scale: Tensor) -> Tensor:
        a, b = (steering.tensors()[f"model.norm.{name}"] for name in "ab")
        return h + scale * (a * h + b)

    one, two = torch.tensor([0.4, 0.9]).view(2, 1, 1), torch.tensor(0.7)
    for first, second in ((gender, race), (race, gender)):
        scales = {gender: one, race: two}
        with first.on(model, scales[first].flatten() if first is gender else 0.7), second.on(model) as handle:
            handle.scale = one.flatten() if second is gender else 0.7
            norm.register_forward_hook(lambda module, args, output: seen.update(steered=output))
            logits(model)
        wanted = by_hand(by_hand(seen["plain"], first, scales[first]), second, scales[second])
        torch.testing.assert_close(seen["steered"], wanted)
        seen[first] = seen["steered"]
    assert not torch.allclose(seen[gender], seen[race])  # the order matters, as T2(T1(h)) is not T1(T2(h))


# ---------------------------------------------------------------- threads


@torch.no_grad()
def test_threads_steer_models_of_their_own_with_one_steering(model):
    models = [tiny_llama() for _ in range(3)]
    steering, base = frozen(model), model.generate(INPUT, output_logits=True, return_dict_in_generate=True, **GREEDY)
    scales = [0.1 * (number + 1) for number in range(3)]

    def answers(place: int) -> list[Tensor]:
        found = []
        for _ in range(2):
            with steering.on(models[place], scales[place]):
                options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
                found.append(torch.stack(models[place].generate(INPUT, **options).logits))
        return found

    wanted = [answers(place)[0] for place in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for place, found in enumerate(pool.map(answers, range(3))):
            assert all(torch.equal(one, wanted[place]) for one in found)
    assert not any(torch.allclose(one, torch.stack(base.logits)) for one in wanted)
    assert [attached(one) for one in models] == [[]] * 3


def test_two_threads_cannot_pull_one_model_in_two_directions(model):
    steering, reached, turned, errors = frozen(model), threading.Event(), threading.Event(), []
    handle = steering.attach(model, 0.4)

    class Wait:  # in the middle of a generation
        def __call__(self, ids, scores, **_):
            if ids.shape[1] == INPUT.shape[1] + 2:
                reached.set()
                turned.wait(60)
            return torch.zeros(len(ids), dtype=torch.bool)

    def generate():
        try:
            model.generate(INPUT, stopping_criteria=[Wait()], **GREEDY)
        except SteeringError as error:
            errors.append(str(error))

    thread = threading.Thread(target=generate)
    thread.start()
    assert reached.wait(60)
    with pytest.raises(SteeringError, match="on the model already"):
        steering.attach(model, 0.8)
    handle.scale = 0.8
    turned.set()
    thread.join(60)
    assert errors == [
        "this key-value cache was begun at scale 0.4, and the scale is 0.8 now: start a new cache "
        "(past_key_values=None), or set the scale back"
    ]


# ---------------------------------------------------------------- caches


def begun(model: nn.Module, **options):
    with torch.no_grad():
        return model(INPUT, use_cache=True, **options).past_key_values


@torch.no_grad()
def go_on(model: nn.Module, cache) -> Tensor:
    return model(torch.tensor([[3], [4]]), past_key_values=cache).logits


@pytest.mark.parametrize("kind", ["made by the model", "dynamic", "static", "copied", "saved"])
def test_a_cache_is_gone_on_with_at_its_own_scale_only(model, kind):
    with frozen(model).on(model, 0.4) as handle:
        options = {"past_key_values": StaticCache(model.config, max_cache_len=16)} if kind == "static" else {}
        cache = begun(model, **options)
        if kind == "copied":
            cache = copy.deepcopy(cache)
        elif kind == "saved":
            torch.save(cache, kept := io.BytesIO())
            kept.seek(0)
            cache = torch.load(kept, weights_only=False)
        elif kind == "dynamic":
            cache = begun(model, past_key_values=type(cache)(config=model.config))
        length = int(cache.get_seq_length())
        for scale in (0.8, 0.0, torch.tensor([0.4, 0.8])):
            handle.scale = scale
            with pytest.raises(SteeringError, match=r"begun at scale 0.4, .*: start a new cache \(past_key_values"):
                go_on(model, cache)
            assert int(cache.get_seq_length()) == length  # refused before anything was added
        handle.scale = torch.tensor([0.4, 0.4])  # as it was begun, row by row
        go_on(model, cache)
        handle.scale = 0.8
        cache.reset()
        if kind == "static":  # an empty cache is a new one
            go_on(model, cache)
            handle.scale = 0.4
            with pytest.raises(SteeringError, match="begun at scale 0.8"):
                go_on(model, cache)


@pytest.mark.parametrize("kind", ["made by the model", "static"])
def test_a_cache_that_was_begun_before_attaching_is_the_base_models(model, kind):
    options = {"past_key_values": StaticCache(model.config, max_cache_len=16)} if kind == "static" else {}
    cache = begun(model, **options)
    base = go_on(model, copy.deepcopy(cache))
    empty = StaticCache(model.config, max_cache_len=16)
    with frozen(model).on(model, 0.4) as handle:
        with pytest.raises(SteeringError, match="begun at scale 0 or .*, and the scale is 0.4 now: start a new"):
            go_on(model, cache)
        begun(model, past_key_values=empty)  # that holds nothing yet
        handle.scale = 0.0
        assert torch.equal(go_on(model, cache), base)


def test_a_cache_that_was_put_together_by_hand_is_said_to_have_a_scale(model):
    with frozen(model).on(model, 0.4) as handle:
        whole = begun(model)
        wanted = go_on(model, copy.deepcopy(whole))
        made = DynamicCache()
        for number, layer in enumerate(whole.layers):
            made.update(layer.keys, layer.values, number)
        with pytest.raises(SteeringError, match="begun at scale 0 or in a pass that nobody watched"):
            go_on(model, made)
        say(made, handle)
        assert torch.equal(go_on(model, made), wanted)


def test_rows_of_a_cache_keep_their_scales(model):
    with frozen(model).on(model, torch.tensor([0.0, 1.0])) as handle:
        cache = begun(model)
        handle.scale = torch.tensor([1.0, 0.0])
        with pytest.raises(SteeringError, match="begun at scale 0, 1, and the scale is 1, 0 now"):
            go_on(model, cache)
        handle.scale = torch.tensor([0.0, 1.0])
        go_on(model, cache)
        cache.batch_select_indices(torch.tensor([1, 0, 1, 0]))
        handle.scale = torch.tensor([1.0, 0.0, 1.0, 0.0])  # other rows: whoever chose them has to know
        with torch.no_grad():
            model(torch.tensor([[3], [4], [5], [6]]), past_key_values=cache)


def test_a_cache_knows_the_steering_and_not_the_handle(model, tmp_path):
    frozen(model).save_pretrained(tmp_path / "s")
    with Steering.from_pretrained(tmp_path / "s").on(model, 0.4):
        cache = begun(model)
    again = Steering.from_pretrained(tmp_path / "s")
    with again.on(model, 0.4):
        go_on(model, cache)
    with again.on(model, 0.8), pytest.raises(SteeringError, match="begun at scale 0.4"):
        go_on(model, cache)
    with again.on(model, 0.4), frozen(model, 9).on(model, 0.3) as other:
        with pytest.raises(SteeringError, match="begun at scale 0, and the scale is 0.3 now"):
            go_on(model, cache)
        other.scale = 0
        go_on(model, cache)


@pytest.mark.parametrize("order", ["compiled first", "attached first"])
def test_the_caches_of_a_model_that_was_compiled_in_place_are_watched(model, order):
    steering = frozen(model)
    if order == "compiled first":
        model.compile(backend="eager")
        call = model._compiled_call_impl
    handle = steering.attach(model, 0.4)
    if order == "attached first":
        model.compile(backend="eager")
        call = model._compiled_call_impl
    cache = begun(model)
    handle.scale = 0.8
    with pytest.raises(SteeringError, match="begun at scale 0.*, and the scale is 0.8 now: start a new cache"):
        go_on(model, cache)
    cache = begun(model)
    wanted = go_on(model, copy.deepcopy(cache))
    handle.scale = 0.4
    with pytest.raises(SteeringError, match="begun at scale 0.8, and the scale is 0.4 now"):
        go_on(model, cache)
    handle.scale = 0.8
    assert torch.equal(go_on(model, cache), wanted)
    handle.detach()
    assert model._compiled_call_impl is call
    torch.compiler.reset()


def test_watching_leaves_a_compiled_graph_whole(model):
    steering, graphs = frozen(model), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    fast = torch.compile(model, backend=backend, fullgraph=True)
    handle = steering.attach(fast, 0.4)
    cache = begun(fast)
    count = len(graphs)
    for scale in (0.7, 0.9):
        handle.scale = scale
        begun(fast)
    assert len(graphs) == count > 0
    with pytest.raises(SteeringError, match="begun at scale 0.4, and the scale is 0.9 now"):
        go_on(fast, cache)
    for scales in ([0.1, 0.9], [0.0, 0.5], [0.5, 0.5]):
        handle.scale = torch.tensor(scales)
        begun(fast)
    assert len(graphs) == 2 * count  # one graph for a scale, one for a scale a row
    handle.detach()
    torch.compiler.reset()


# ---------------------------------------------------------------- what is kept between passes


def test_a_loaded_steering_gives_what_one_in_training_gives(model):
    training, loaded = moved(model), frozen(model)
    for scale in (0.3, torch.tensor([0.3, 0.8]), torch.tensor([0.0, 0.8])):
        with training.on(model, scale):
            wanted = logits(model)
        with loaded.on(model, scale):
            assert torch.equal(logits(model), wanted) and torch.equal(logits(model), wanted)


@pytest.mark.parametrize("operator", ["affine", "scale", "bias", "low_rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_scale_0_is_kept_to_the_bit(operator, dtype):
    norm = nn.LayerNorm(4)
    steering = Steering(
        SteeringConfig(operator=operator, rank=2 if operator == "low_rank" else None, sites={"norm": 4})
    ).requires_grad_(False)
    for value in steering.parameters():
        value.fill_(torch.nan)
    with steering.on(nn.ModuleDict({"norm": norm}), torch.tensor([0.0, 1.0])):
        (hook,) = norm._forward_hooks.values()
        h = torch.tensor([[0.0, -0.0, 1e-40, torch.inf], [1.0, 2.0, 3.0, 4.0]]).to(dtype)
        found = hook(norm, (), h)
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(found[0].view(bits), h[0].view(bits)) and found[1].isnan().all()


def test_what_is_kept_follows_coefficients_rows_and_devices(model):
    steering, other = frozen(model), frozen(model, 5)
    wanted = at(model, other, 0.5)
    with steering.on(model, 0.5) as handle, torch.inference_mode():
        logits(model)
        steering.load_tensors(other.tensors())
        assert torch.equal(logits(model), wanted)
        handle.scale = torch.tensor([0.5, 0.5])
        twice = model(INPUT.repeat_interleave(2, 0)).logits
        torch.testing.assert_close(logits(model), wanted)
        torch.testing.assert_close(twice[::2], wanted)
    with steering.on(model, 0.5):  # what inference mode left can still be differentiated through
        model.get_input_embeddings().requires_grad_(True)
        model(INPUT).logits.sum().backward()
    with steering.on(model, 0.5):
        model.to("meta")
        assert model(INPUT.to("meta")).logits.is_meta
    assert not any(value.is_meta for value in steering.parameters())  # another model may be where they are


def test_a_site_costs_one_operation_and_none_of_its_coefficients(model):
    steering = frozen(model, sites=["model.norm"])
    with steering.on(model, 0.5) as handle:
        (hook,) = model.model.norm._forward_hooks.values()
        assert isinstance(hook, SiteHook)
        h, calls = torch.randn(2, 3, 16), []

        class Counting(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                calls.append(str(function))
                return function(*args, **(kwargs or {}))

        hook(model.model.norm, (), h)
        handle.scale = 0.5  # as before
        with Counting():
            hook(model.model.norm, (), h)
        assert calls == ["aten.addcmul.default"]
        handle.scale = 0.6
        with Counting():
            hook(model.model.norm, (), h)
        assert len(calls) > 2


# ---------------------------------------------------------------- placed by transformers


def test_a_model_on_several_places_is_steered(model, tmp_path):
    pytest.importorskip("accelerate")
    steering = frozen(model)
    wanted = at(model, steering, 0.5)
    model.save_pretrained(tmp_path / "m")
    places = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
        "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "o")
    assert placed.model.layers[1].input_layernorm.weight.is_meta
    base = logits(placed)
    torch.testing.assert_close(at(placed, steering, 0.5), wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(placed), base)


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_model_that_bitsandbytes_quantised_is_steered(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    model = tiny_llama(width=64)
    steering, projections = frozen(model), frozen(model, sites=["attention"])
    model.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**{bits: True}))
    base, steered = logits(quantised), at(quantised, steering, 0.5)
    assert (steered - base).abs().max() > 0.5
    torch.testing.assert_close(logits(quantised), base, atol=1e-3, rtol=1e-3)
    with pytest.raises(SteeringError, match=r"'model.layers.0.self_attn.q_proj' is quantised, .*check=False"):
        projections.attach(quantised)
