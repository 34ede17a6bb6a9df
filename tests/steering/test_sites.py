"""Which modules are steered: exact names, written down by hand from the models' own module trees."""

from __future__ import annotations

import re

import pytest
import torch
from architectures import tiny
from expected_sites import TEXT_SITES as EXPECTED
from torch import nn
from transformers import LlamaConfig

from dso.errors import UserError
from dso.steering.model import Steering
from dso.steering.sites import resolve_sites


@pytest.mark.parametrize("architecture", EXPECTED)
def test_default_sites(architecture):
    model = tiny(architecture)
    assert list(resolve_sites(model).items()) == [(name, 16) for name in EXPECTED[architecture]]
    for name in EXPECTED[architecture]:
        model.get_submodule(name)


@pytest.mark.parametrize("architecture", ["Qwen3", "Gemma3", "OLMo2"])
@pytest.mark.parametrize("heads", [1, 2])
def test_query_and_key_norms_are_left_out_whatever_their_width(architecture, heads):
    # With one head of the hidden size, and in OLMo2 always, their width is that of the others.
    changes = {} if architecture == "OLMo2" else {"head_dim": 16 // heads}
    model = tiny(architecture, num_attention_heads=heads, num_key_value_heads=heads, **changes)
    left_out = {name for name, _ in model.named_modules() if name.endswith((".q_norm", ".k_norm"))}
    assert len(left_out) == 4
    assert list(resolve_sites(model)) == EXPECTED[architecture]
    assert set(resolve_sites(model, [r".*[qk]_norm"])) == left_out


def test_patterns_name_sites_in_the_order_of_the_model():
    model = tiny("Llama")
    layers = [r"model\.norm", r"model\.layers\.1\..*norm"]
    wanted = ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"]
    assert list(resolve_sites(model, layers).items()) == [(name, 16) for name in wanted]
    assert list(resolve_sites(model, [*layers, *layers])) == wanted
    assert list(resolve_sites(model, ["model.norm"])) == ["model.norm"]


PROJECTIONS = {
    "Llama": {  # two heads share one key and one value
        f"model.layers.{layer}.self_attn.{name}_proj": width
        for layer in range(2)
        for name, width in {"q": 16, "k": 8, "v": 8}.items()
    },
    "GPT-2": {f"transformer.h.{layer}.attn.c_attn": 48 for layer in range(2)},  # a Conv1D for all three
}


@pytest.mark.parametrize("architecture", PROJECTIONS)
def test_patterns_that_match_no_norm_name_linear_layers(architecture):
    model = tiny(architecture)
    own = r".*\.([qkv]_proj|c_attn)"
    assert resolve_sites(model, [own]) == PROJECTIONS[architecture]
    norm = list(resolve_sites(model))[0]
    both = {norm: 16, **PROJECTIONS[architecture]}
    assert resolve_sites(model, [own, re.escape(norm)]) == both  # each pattern by itself


@torch.no_grad()
@pytest.mark.parametrize("architecture", EXPECTED)
def test_attention_means_the_projections_of_every_layer(architecture):
    model = tiny(architecture)
    if architecture == "Mamba":
        with pytest.raises(UserError, match="has no query, key or value projection of a known name in its language"):
            resolve_sites(model, ["attention"])
        return
    sites = resolve_sites(model, ["attention"])
    passed: dict[str, list[str]] = {}  # attention layer -> its projections

    def look(name: str):
        def hook(module, args, output):
            assert output.shape[-1] == sites[name]
            layer, projection = name.rsplit(".", 1)
            passed.setdefault(layer, []).append(projection)

        return hook

    for name in sites:
        model.get_submodule(name).register_forward_hook(look(name))
    model(torch.tensor([[5, 6, 7]]))
    fused = {"Phi3": "qkv_proj", "GPT-2": "c_attn", "MPT": "Wqkv"}.get(architecture, "query_key_value")
    assert len(passed) == model.config.num_hidden_layers
    assert all({*found} in ({"q_proj", "k_proj", "v_proj"}, {fused}) for found in passed.values())
    assert resolve_sites(model, ["attention", "norms"]).items() == (sites | resolve_sites(model)).items()


def test_a_linear_layer_is_steered_at_its_output():
    model = tiny("Llama")
    steering = Steering.for_model(model, sites=[r".*\.0\.self_attn\.k_proj"])
    site, operator = next(iter(steering.operators.items()))
    with torch.no_grad():
        operator.a.uniform_(-1, 1)
        operator.b.uniform_(-1, 1)
    layer = model.get_submodule(site)
    h = torch.randn(2, 3, 16)
    with torch.no_grad():
        base = layer(h)
        with steering.on(model, scale=0.5):
            torch.testing.assert_close(layer(h), base + 0.5 * (operator.a * base + operator.b))
        with steering.on(model, scale=0.0):
            assert torch.equal(layer(h), base)
    with pytest.raises(UserError, match=rf"module '{site}' has width 16, expected 8"):
        steering.attach(tiny("Llama", num_key_value_heads=2))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("norm", "'norm' matches no norm; norms are e.g. model.layers.0.input_layernorm"),  # matched in full
        (r"model\.layers\.0\.mlp", "matches no norm"),  # a module, but no norm
        ("(", r"'\(' is no regular expression: missing \)"),
    ],
)
def test_patterns_that_name_nothing_are_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        resolve_sites(tiny("Llama"), ["model.norm", pattern])


class Tower(nn.Module):
    """A language backbone beside a vision tower of the same width, as in a vision-language model."""

    def __init__(self):
        super().__init__()
        self.config = LlamaConfig(hidden_size=8, num_attention_heads=1)
        self.vision = nn.ModuleDict({"norm": nn.LayerNorm(8), "batch": nn.BatchNorm2d(8), "group": nn.GroupNorm(2, 8)})
        self.language = nn.ModuleDict({"norm": nn.RMSNorm(8), "bare": nn.LayerNorm(8, elementwise_affine=False)})
        self.language["narrow"] = nn.LayerNorm(4)
        self.language["line"] = nn.Linear(8, 8)
        self.language2 = nn.LayerNorm(8)
        for tower in (self.vision, self.language):
            tower["q_proj"] = nn.Linear(8, 6)

    def get_decoder(self):
        return self.language


def test_only_the_language_backbone_unless_asked_for():
    model = Tower()
    assert resolve_sites(model) == {"language.norm": 8, "language.bare": 8}
    assert resolve_sites(model, ["vision.*"]) == {"vision.norm": 8}  # batch and group norms work on other dimensions
    assert resolve_sites(model, [".*narrow"]) == {"language.narrow": 4}
    assert resolve_sites(model, ["attention"]) == {"language.q_proj": 6}


def test_a_model_without_norms_says_so():
    model = Tower()
    model.config = LlamaConfig(hidden_size=10, num_attention_heads=1)
    with pytest.raises(UserError, match="Tower has no norm of width 10 in its language backbone; name the sites by"):
        resolve_sites(model)
    with pytest.raises(UserError, match="norms are e.g. none"):
        resolve_sites(nn.Sequential(nn.Linear(2, 2)), ["x"])


@torch.no_grad()
@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_site_gives_one_tensor_of_its_width(architecture):
    model = tiny(architecture)
    seen = {}

    def look(name: str):
        return lambda module, args, output: seen.update({name: tuple(output.shape)})

    for name in resolve_sites(model):
        model.get_submodule(name).register_forward_hook(look(name))
    model(torch.tensor([[5, 6, 7]]))
    wanted = dict.fromkeys(EXPECTED[architecture], (1, 3, 16))
    if architecture == "OPT":  # flattens batch and length before its feed-forward part
        wanted |= {f"model.decoder.layers.{layer}.final_layer_norm": (3, 16) for layer in range(2)}
    assert seen == wanted
