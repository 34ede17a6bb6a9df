"""Tiny models as GGUF files, and what llama.cpp's server says of the next token."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

NAMES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """Write a model in float32, as llama.cpp's ``convert_hf_to_gguf.py`` does, with made-up words: ask by ids."""
    config = model.config
    name = NAMES[config.model_type]
    gemma = name == "gemma3"
    writer = gguf.GGUFWriter(path, name)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = config.rope_parameters
    writer.add_rope_freq_base((rope["full_attention"] if gemma else rope)["rope_theta"])
    if gemma:
        writer.add_sliding_window(config.sliding_window)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<pad>", "<eos>", *(f"w{token}" for token in range(2, config.vocab_size))])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control, control, *[normal] * (config.vocab_size - 2)])
    writer.add_token_merges(["w 2"])
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    kind = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    places = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        module, _, part = key.rpartition(".")
        if module == "lm_head" and config.tie_word_embeddings:
            continue
        value = value.float()
        if name == "llama" and module.endswith(("q_proj", "k_proj")):  # halves of a head there, pairs here
            value = value.reshape(-1, 2, width // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
        if gemma and module.endswith("norm"):
            value = value + 1
        writer.add_tensor(f"{places.get_name(module)}.{part}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def next_token(url: str, ids: Sequence[int], scale: float | None) -> torch.Tensor:
    """Log-probabilities of the next token (vocabulary of the tiny models) at the scale of the first adapter."""
    body: dict[str, Any] = {"prompt": [*ids], "n_predict": 1, "n_probs": 258, "temperature": 0}
    if scale is not None:
        body["lora"] = [{"id": 0, "scale": scale}]
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as reply:
        listed = json.load(reply)["completion_probabilities"][0]["top_logprobs"]
    found = torch.full((258,), float("nan"))
    for entry in listed:
        found[entry["id"]] = entry["logprob"]
    return found
