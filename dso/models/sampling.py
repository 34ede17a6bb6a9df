"""Sampled answers: what a model writes, not what it would give a candidate.

Answers are drawn at a temperature from the whole distribution (no nucleus, no top-k: what is sampled from is what the
policy gradient differentiates), and each ends at an end token or at the length limit. Where packing is exact
(:mod:`dso.models.packing`) the prompts of a portion pass through the model as one prefix tree, and every answer goes
on from copies of the keys and values on its prompt's path: what prompts share is computed once. Prompts of different
lengths are padded on the left where that changes no answer (:mod:`dso.models.layout`), else each length, or each
prompt, is by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.layout import positive
from dso.models.packing import pack
from dso.models.scores import kl_divergence
from dso.models.scoring import token_logits
from dso.steering.handle import Handle

Tokens = Sequence[int]
ROWS = 256
CACHE_BYTES = 2_000_000_000


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_rows: int | None = None,
) -> list[list[int]]:
    """One answer to each prompt, as the model is now; a prompt that is given n times gets n answers.

    Args:
        prompts: token ids, none empty.
        max_new_tokens: at least 1.
        temperature: of sampling; at 0 every token is the most probable one.
        max_rows: answers that are written side by side; None is as many as 2 GB of keys and values hold, at most 256.

    Returns:
        the new tokens of each answer, 1 to ``max_new_tokens``, in the order of the prompts; an end token is the last.
    """
    stop = end_tokens(backbone)
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for rows in _portions(backbone, prompts, order, max_new_tokens, max_rows):
        written = _write(backbone, [tuple(prompts[row]) for row in rows], max_new_tokens, stop, temperature)
        for row, tokens in zip(rows, written, strict=True):
            answers[row] = _ended(tokens, stop)
    return answers


def _portions(
    backbone: Backbone, prompts: Sequence[Tokens], order: Sequence[int], new: int, most: int | None
) -> Iterator[list[int]]:
    """The prompts that are answered together, in an order that prompts with a common beginning are neighbours in."""
    lengths: dict[int, list[int]] = {}
    for row in order:
        lengths.setdefault(0 if backbone.company == "any" else len(prompts[row]), []).append(row)
    for rows in lengths.values():
        longest = max(len(prompts[row]) for row in rows)
        size = most or max(1, min(ROWS, CACHE_BYTES // (token_bytes(backbone.model) * (longest + new))))
        size = 1 if backbone.company == "none" else size
        yield from (rows[start : start + size] for start in range(0, len(rows), size))


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token."""
    config = model.config.get_text_config()
    heads = positive(config, "num_attention_heads") or 1
    width = positive(config, "head_dim") or (positive(config, "hidden_size") or 1) // heads
    kept = positive(config, "num_key_value_heads") or heads
    return 2 * (positive(config, "num_hidden_layers") or 1) * kept * width * model.dtype.itemsize


def _write(
    backbone: Backbone, prompts: Sequence[tuple[int, ...]], max_new_tokens: int, stop: Sequence[int], temperature: float
) -> list[list[int]]:
    from transformers import GenerationConfig

    model, device = backbone.model, backbone.device
    pad = stop[0] if stop else 0
    different = list(dict.fromkeys(prompts))
    number = {prompt: place for place, prompt in enumerate(different)}
    copies = torch.tensor([number[prompt] for prompt in prompts], device=device)
    ids, mask = (tensor.to(device) for tensor in _left_padded(different, pad))
    options: dict[str, Any] = {}
    if (cache := _prefill(backbone, different, ids, mask)) is not None:
        cache.batch_select_indices(copies)
        options["past_key_values"] = cache
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=list(stop) or None,
        **({"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}),
    )  # fmt: skip
    own, model.generation_config = model.generation_config, GenerationConfig()  # a repetition penalty would come in
    try:
        output = model.generate(ids[copies], attention_mask=mask[copies], generation_config=config, **options)
    finally:
        model.generation_config = own
    return output[:, ids.shape[1] :].tolist()


def _prefill(backbone: Backbone, prompts: Sequence[tuple[int, ...]], ids: Tensor, mask: Tensor) -> Any:
    """Keys and values of N prompts but for their last tokens, left-padded; None if a model's state is more than those.

    Args:
        ids, mask: (N, P) the prompts, left-padded.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if backbone.layout != "packed" or ids.shape[1] < 2:
        return None
    model, row = backbone.model, pack([prompt[:-1] for prompt in prompts])
    # A layer that keeps a window only has no room for the nodes of a tree.
    whole = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    if not whole or not backbone.fits(row.input_ids.shape[1]):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": places[:, :-1]}
        return model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    cache = model(**row.inputs(model), use_cache=True, logits_to_keep=1).past_key_values
    longest = ids.shape[1] - 1
    index = torch.tensor([[*[0] * (longest - len(path)), *path] for path in row.paths], device=ids.device)
    for layer in cache.layers:
        layer.keys, layer.values = (states[0][:, index].transpose(0, 1) for states in (layer.keys, layer.values))
    return cache


def _left_padded(prompts: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (longest - len(prompt)), *prompt] for prompt in prompts])
    mask = torch.tensor([[*[0] * (longest - len(prompt)), *[1] * len(prompt)] for prompt in prompts])
    return ids, mask


def _ended(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """Up to and with the first end token."""
    end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens))
    return tokens[: end + 1]


def end_tokens(backbone: Backbone) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and those that the model's generation config states."""
    stated = getattr(backbone.model.generation_config, "eos_token_id", None)
    found = [backbone.tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
    return tuple(dict.fromkeys(token for token in found if token is not None))


@torch.no_grad()
def token_kl(backbone: Backbone, handle: Handle, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> list[float]:
    """KL(pi_s || pi_0) in nats of the next-token distribution, mean over the tokens of each answer.

    The whole distribution is compared at every token, so with answers that were sampled at the handle's scale the mean
    is an unbiased estimate of the KL a token, with less variance than one from the sampled tokens alone.
    """
    encoded = [Encoded(tuple(prompt), (tuple(answer),)) for prompt, answer in zip(prompts, answers, strict=True)]
    found = [0.0] * len(encoded)
    scale = handle.scale
    for rows, layout in backbone.passes(encoded):
        chosen = [encoded[row] for row in rows]
        reads, steered = token_logits(backbone.model, chosen, layout)
        handle.scale = 0.0
        try:
            _, base = token_logits(backbone.model, chosen, layout)
        finally:
            handle.scale = scale
        divergence = kl_divergence(steered.float().log_softmax(-1), base.float().log_softmax(-1))
        for row, read in zip(rows, reads, strict=True):
            found[row] = float(divergence[read].mean().clamp(min=0.0))  # rounding may leave it below
    return found
