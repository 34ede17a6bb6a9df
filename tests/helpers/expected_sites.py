"""The default sites of every architecture in :mod:`architectures`, written down by hand from the models' own code."""

from __future__ import annotations

PRE = ["model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm"]
SANDWICH = [*PRE, "model.layers.{}.pre_feedforward_layernorm", "model.layers.{}.post_feedforward_layernorm"]
POST = ["model.layers.{}.post_attention_layernorm", "model.layers.{}.post_feedforward_layernorm"]
GPT = ["transformer.h.{}.ln_1", "transformer.h.{}.ln_2"]


def twice(names: list[str], *last: str) -> list[str]:
    """The names in layer 0 and in layer 1, and what comes after both."""
    return [name.format(layer) for layer in range(2) for name in names] + list(last)


TEXT_SITES = {
    "Llama": twice(PRE, "model.norm"),
    "Mistral": twice(PRE, "model.norm"),
    "Mixtral": twice(PRE, "model.norm"),
    "Qwen2": twice(PRE, "model.norm"),
    "Qwen3": twice(PRE, "model.norm"),
    "Qwen3-MoE": twice(PRE, "model.norm"),
    "Phi3": twice(PRE, "model.norm"),
    "Llama4": twice(PRE, "model.norm"),
    "OLMo": twice(PRE, "model.norm"),
    "OLMo2": twice(POST, "model.norm"),
    "Gemma2": twice(SANDWICH, "model.norm"),
    "Gemma3": twice(SANDWICH, "model.norm"),
    "GPT-2": twice(GPT, "transformer.ln_f"),
    "GPT-J": ["transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f"],
    "GPT-Neo": twice(GPT, "transformer.ln_f"),
    "GPT-NeoX": twice(
        ["gpt_neox.layers.{}.input_layernorm", "gpt_neox.layers.{}.post_attention_layernorm"],
        "gpt_neox.final_layer_norm",
    ),
    "OPT": [
        "model.decoder.final_layer_norm",
        *twice(["model.decoder.layers.{}.self_attn_layer_norm", "model.decoder.layers.{}.final_layer_norm"]),
    ],
    "Falcon": ["transformer.h.0.input_layernorm", "transformer.h.1.input_layernorm", "transformer.ln_f"],
    "Falcon-ALiBi": ["transformer.h.0.input_layernorm", "transformer.h.1.input_layernorm", "transformer.ln_f"],
    "Falcon-40B": twice(["transformer.h.{}.ln_attn", "transformer.h.{}.ln_mlp"], "transformer.ln_f"),
    "Bloom": [
        "transformer.word_embeddings_layernorm",
        *twice(["transformer.h.{}.input_layernorm", "transformer.h.{}.post_attention_layernorm"], "transformer.ln_f"),
    ],
    "MPT": twice(["transformer.blocks.{}.norm_1", "transformer.blocks.{}.norm_2"], "transformer.norm_f"),
    "Mamba": ["backbone.layers.0.norm", "backbone.layers.1.norm", "backbone.norm_f"],
}

LANGUAGE = twice(
    ["model.language_model.layers.{}.input_layernorm", "model.language_model.layers.{}.post_attention_layernorm"],
    "model.language_model.norm",
)
TEXT_MODEL = [name.replace("language_model", "text_model") for name in LANGUAGE]
# Not among them: norms of the vision tower, of what joins it to the language model, and per-head query and key norms.
VISION_SITES = {
    "LLaVA": LANGUAGE,
    "LLaVA-OneVision": LANGUAGE,
    "Qwen2-VL": LANGUAGE,
    "Qwen2.5-VL": LANGUAGE,
    "Qwen3-VL": LANGUAGE,
    "Gemma3-VL": [name.replace("model.", "model.language_model.", 1) for name in twice(SANDWICH, "model.norm")],
    "Mllama": [
        "model.language_model.layers.0.input_layernorm",
        "model.language_model.layers.0.post_attention_layernorm",
        "model.language_model.layers.1.input_layernorm",  # a layer of cross attention
        "model.language_model.layers.1.post_attention_layernorm",
        "model.language_model.layers.2.input_layernorm",
        "model.language_model.layers.2.post_attention_layernorm",
        "model.language_model.norm",
    ],
    "Idefics3": TEXT_MODEL,
    "SmolVLM": TEXT_MODEL,
    "InternVL": LANGUAGE,
    "PaliGemma": LANGUAGE,
}
