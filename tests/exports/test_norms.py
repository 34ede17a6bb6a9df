"""What a norm does with its weight, and who reads it: answers that were written down by hand from the models' code."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny
from cases import CASES
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

from dso.exports.norms import NormForm, norm_form
from dso.exports.readers import Readers, probe_inputs, readers
from dso.steering.hosts import named_sites
from dso.steering.model import Steering
from dso.steering.sites import resolve_sites

RMS, GEMMA, LAYER = NormForm(True, 0.0, False), NormForm(True, 1.0, False), NormForm(True, 0.0, True)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
LLAMA = {"input_layernorm": QKV, "post_attention_layernorm": MLP}
SANDWICH = {
    "input_layernorm": QKV, "post_attention_layernorm": (), "pre_feedforward_layernorm": MLP,
    "post_feedforward_layernorm": (),
}  # fmt: skip
EXPERTS = {"input_layernorm": QKV, "post_attention_layernorm": ()}
GPT = {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)}
FALCON = {"input_layernorm": ("self_attention.query_key_value", "mlp.dense_h_to_4h")}
WANTED: dict[str, tuple[NormForm, dict[str, tuple[str, ...]]]] = {
    "Llama": (RMS, LLAMA), "Mistral": (RMS, LLAMA), "Qwen2": (RMS, LLAMA), "Qwen3": (RMS, LLAMA),
    "Mixtral": (RMS, EXPERTS), "Qwen3-MoE": (RMS, EXPERTS),
    "Gemma2": (GEMMA, SANDWICH), "Gemma3": (GEMMA, SANDWICH), "Gemma3-VL": (GEMMA, SANDWICH),
    "Phi3": (RMS, {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)}),
    "GPT-2": (LAYER, GPT),
    "GPT-NeoX": (
        LAYER,
        {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
    ),
    "OPT": (
        LAYER,
        {
            "self_attn_layer_norm": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
            "final_layer_norm": ("fc1",),
        },
    ),
    "OLMo2": (RMS, {"post_attention_layernorm": (), "post_feedforward_layernorm": ()}),
    "Falcon": (LAYER, FALCON), "Falcon-ALiBi": (LAYER, FALCON),
    "Falcon-40B": (LAYER, {"ln_attn": ("self_attention.query_key_value",), "ln_mlp": ("mlp.dense_h_to_4h",)}),
    "PaliGemma": (GEMMA, LLAMA),
} | dict.fromkeys(
    ("LLaVA", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Mllama", "Idefics3", "SmolVLM", "InternVL"),
    (RMS, LLAMA),
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forms_and_readers_of_every_architecture(name: str) -> None:
    form, by_norm = WANTED[name]
    model = CASES[name].backbone(layout="padded").model
    sites = resolve_sites(model)
    modules = named_sites(model)
    assert {norm_form(modules[site], width) for site, width in sites.items()} == {form}
    found = readers(model, sites)
    assert list(found) == list(sites)
    layer = next(site for site in sites if ".0." in site).split(".0.")[0] + ".0."
    for norm, linears in by_norm.items():
        wanted = tuple(layer + linear for linear in linears)
        reason = "" if linears else "no linear layer reads it"
        assert found[layer + norm] == Readers(wanted, bool(linears), reason)
    final = next(site for site in sites if ".0." not in site and ".1." not in site and ".2." not in site)
    assert found[final] == Readers(("lm_head",), True)


def test_a_layer_that_only_images_reach_is_not_known_without_them() -> None:
    found = readers(CASES["Mllama"].backbone(layout="padded").model, ["model.language_model.layers.1.input_layernorm"])
    assert [*found.values()] == [Readers((), False, "it did not run on the probe's tokens")]


def test_a_norm_that_experts_read_beside_a_linear_layer_has_other_readers() -> None:
    found = readers(tiny("Llama4"), ["model.layers.0.post_attention_layernorm"])[
        "model.layers.0.post_attention_layernorm"
    ]
    assert not found.sole and found.reason == "others read it too"


def test_a_residual_that_starts_at_the_norm_is_another_reader() -> None:
    site = "transformer.h.0.input_layernorm"
    assert readers(tiny("Bloom"), [site])[site].sole
    found = readers(tiny("Bloom", apply_residual_connection_post_layernorm=True), [site])[site]
    assert found == Readers(("transformer.h.0.self_attention.query_key_value",), False, "others read it too")


class Changed(nn.Module):
    """A language model's shape around one norm and one linear layer, joined by ``between``."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9)
        self.between = between

    def forward(self, input_ids):
        h = self.embed(input_ids)
        return type("Output", (), {"logits": self.between(self, h, self.norm(h))})


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda m, h, x: m.head(x[:, 1:]), ""),
        (lambda m, h, x: m.head(x.view(-1, 4)), ""),
        (lambda m, h, x: m.head(x.add_(h)), "others read it too"),  # in place: the same memory, other values
        (lambda m, h, x: m.head(x + 0 * h), "no linear layer reads it"),
        (lambda m, h, x: m.head(x.view(-1)[2:-2].view(1, -1, 4)), "no linear layer reads it"),  # parts of two rows
        (lambda m, h, x: m.head(x) + m.head(h), "head reads something else, too"),
        (lambda m, h, x: m.head(x) + x[..., :1], "others read it too"),
        (lambda m, h, x: m.head(h), "no linear layer reads it"),
    ],
)
def test_a_layer_reads_a_norm_where_it_gets_its_rows_and_nothing_else(between, reason: str) -> None:
    model = Changed(between)
    found = readers(model, ["norm"], {"input_ids": torch.tensor([[1, 2, 3]])})["norm"]
    assert (found.sole, found.reason) == (not reason, reason)


def test_the_model_is_as_it_was_and_an_attached_steering_does_not_matter() -> None:
    model = tiny("Llama").train()
    steering = Steering.for_model(model)
    with torch.no_grad():
        for value in steering.tensors().values():
            value.fill_(0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = readers(model, steering.config.sites)
    with steering.on(model, 0.5) as handle:
        assert readers(model, steering.config.sites) == wanted
        assert handle.scale == 0.5
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_probe_uses_no_token_that_means_an_image() -> None:
    model = CASES["LLaVA"].backbone(layout="padded").model
    ids = probe_inputs(model)["input_ids"]
    assert ids.shape == (1, 5) and model.config.image_token_index not in ids.tolist()[0]
    assert not {0, 1, 2} & set(ids.tolist()[0])


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) * (2 + self.weight)


@pytest.mark.parametrize(
    ("module", "form"),
    [
        (nn.LayerNorm(8), LAYER),
        (nn.LayerNorm(8, bias=False), RMS),
        (nn.LayerNorm(8, elementwise_affine=False), NormForm(False, 1.0, False)),
        (nn.RMSNorm(8), RMS),
        (LlamaRMSNorm(8).to(torch.bfloat16), RMS),
        (Gemma3RMSNorm(8), GEMMA),
        (OlmoLayerNorm(8), NormForm(False, 1.0, False)),
        (Doubled(8), None),  # not affine in its weight
        (nn.PReLU(8), None),
        (nn.Linear(8, 8), None),
        (nn.Sequential(nn.LayerNorm(8)), None),
    ],
)
def test_the_form_is_measured_and_not_read_off_the_name(module: nn.Module, form: NormForm | None) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    assert norm_form(module, 8) == form
    assert not calls and all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
