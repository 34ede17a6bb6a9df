"""Tiny models of many architectures from their config classes, and the plain loop that their scores must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from dso.models.encoded import Encoded, answer_positions
from dso.models.scores import Scores

LLAMA = {
    "vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
BLOOM = {"vocab_size": 258, "hidden_size": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
FALCON = {
    "vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {
    "vocab_size": 258, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": 1, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
GEMMA = LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16}
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "Llama": ("LlamaConfig", LLAMA),
    "Mistral": ("MistralConfig", LLAMA | {"sliding_window": 16}),
    "Mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4}),
    "Qwen2": ("Qwen2Config", LLAMA),
    "Qwen3": ("Qwen3Config", LLAMA | {"head_dim": 8}),
    "Qwen3-MoE": (
        "Qwen3MoeConfig",
        LLAMA | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "Gemma2": ("Gemma2Config", GEMMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 3.0}),
    "Gemma3": ("Gemma3TextConfig", GEMMA),
    "Phi3": ("Phi3Config", LLAMA),
    "OLMo": ("OlmoConfig", LLAMA),
    "OLMo2": ("Olmo2Config", LLAMA),
    "Llama4": (
        "Llama4TextConfig",
        LLAMA | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 32, "attention_chunk_size": 16},
    ),
    "GPT-2": ("GPT2Config", GPT2),
    "GPT-J": ("GPTJConfig", GPT2 | {"rotary_dim": 4}),
    "GPT-Neo": (
        "GPTNeoConfig",
        {k: LLAMA[k] for k in ("vocab_size", "hidden_size", "max_position_embeddings", "initializer_range")}
        | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16}
        | {"bos_token_id": None, "eos_token_id": 1},
    ),
    "GPT-NeoX": ("GPTNeoXConfig", {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}),
    "OPT": (
        "OPTConfig",
        {k: LLAMA[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
        | {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 128, "init_std": 0.3, "dropout": 0.0}
        | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None},
    ),
    "Falcon": ("FalconConfig", FALCON | {"alibi": False}),
    "Falcon-ALiBi": ("FalconConfig", FALCON | {"alibi": True}),
    "Falcon-40B": ("FalconConfig", FALCON | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 1}),
    "Bloom": ("BloomConfig", BLOOM),
    "MPT": ("MptConfig", {"vocab_size": 258, "d_model": 16, "n_layers": 2, "n_heads": 2, "initializer_range": 0.3}),
    "Mamba": (
        "MambaConfig",
        {"vocab_size": 258, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.3},
    ),
}


def tiny(architecture: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A random model with weights large enough that its answers differ."""
    name, settings = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings | changes)).eval()


def tokens(length: int, seed: int) -> tuple[int, ...]:
    """Random token ids of the tiny models, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 258, (length,), generator=generator).tolist())


def questions(lengths: Sequence[int] = (7, 3, 5, 7), seed: int = 0) -> list[Encoded]:
    """Decisions with 2, 3, 4, ... candidates of 1 to 3 tokens; all prompts share their first two tokens."""
    shared = tokens(2, seed)
    made = []
    for number, length in enumerate(lengths):
        prompt = shared + tokens(length - 2, seed + 10 * number + 1)
        candidates = [tokens(1 + k % 3, seed + 100 * number + k) for k in range(2 + number % 3)]
        made.append(Encoded(prompt, tuple(candidates)))
    return made


def alone(model, encoded: Sequence[Encoded]) -> Scores:
    """The definition: each candidate in a forward pass of its own, no padding, no mask, no positions."""
    width = max(len(e.candidates) for e in encoded)
    log_probs = torch.full((len(encoded), width), -torch.inf)
    lengths = torch.ones(len(encoded), width, dtype=torch.long)
    next_token, later, hidden = [], [], []
    for row, e in enumerate(encoded):
        behind: dict[tuple[int, ...], Tensor] = {}
        for column, candidate in enumerate(e.candidates):
            output = model(torch.tensor([[*e.prompt, *candidate]]), output_hidden_states=True)
            table = output.logits[0].float().log_softmax(-1)
            start = len(e.prompt) - 1
            terms = [table[start + place, token] for place, token in enumerate(candidate)]
            log_probs[row, column] = torch.stack(terms).sum()
            lengths[row, column] = len(candidate)
            behind |= {candidate[:place]: table[start + place] for place in range(len(candidate))}
        log_probs[row, : len(e.candidates)] = exclusive(log_probs[row, : len(e.candidates)], e.candidates)
        first, *rest = behind.values()
        next_token.append(first)
        later += rest
        hidden.append(output.hidden_states[-1][0, start].detach().float())
    return Scores(
        log_probs, lengths, torch.stack([*next_token, *later]), torch.stack(hidden), answer_positions(encoded)
    )


def exclusive(log_probs: Tensor, candidates: Sequence[Sequence[int]]) -> Tensor:
    """What is left of each candidate's probability without that of the candidates which its tokens begin."""
    probabilities, left = log_probs.double().exp(), []
    for own, whole in zip(candidates, probabilities, strict=True):
        longer = [k for k, other in enumerate(candidates) if len(other) > len(own) and other[: len(own)] == own]
        nearest = [
            k
            for k in longer
            if not any(k != j and candidates[k][: len(candidates[j])] == candidates[j] for j in longer)
        ]
        left.append(whole - probabilities[nearest].sum())
    return torch.stack(left).log().to(log_probs)


def assert_same(found: Scores, wanted: Scores, tolerance: float = 2e-5) -> None:
    """Every tensor of both, where both have it."""
    assert torch.equal(found.lengths, wanted.lengths)
    assert torch.equal(found.log_probs.isinf(), wanted.log_probs.isinf())
    for name in ("log_probs", "next_token", "hidden"):
        pair: tuple[Tensor | None, Tensor | None] = getattr(found, name), getattr(wanted, name)
        if pair[0] is not None and pair[1] is not None:
            torch.testing.assert_close(*pair, atol=tolerance, rtol=tolerance)
