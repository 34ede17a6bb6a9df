"""Sampled answers: what a model writes, not what it would give a candidate.

Answers are drawn at a temperature from the whole distribution (no nucleus, no top-k: what is sampled from is what the
policy gradient differentiates), and each ends at an end token or at the length limit. Where packing is exact
(:mod:`dso.models.packing`) the prompts of a portion pass through the model as one prefix tree, and every answer goes
on from copies of the keys and values on its prompt's path: what prompts share is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.packing import pack
from dso.models.scores import kl_divergence
from dso.models.scoring import token_logits
from dso.steering.handle import Handle

Tokens = Sequence[int]


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    max_rows: int = 256,
) -> list[list[int]]:
    """One answer to each prompt, as the model is now; a prompt that is given n times gets n answers.

    Args:
        prompts: token ids, none empty.
        max_new_tokens, temperature: at least 1, and above 0.
        max_rows: answers that are written side by side.

    Returns:
        the new tokens of each answer, 1 to ``max_new_tokens``, in the order of the prompts; an end token is the last.
    """
    stop = end_tokens(backbone)
    order = sorted(range(len(prompts)), key=lambda index: tuple(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), max_rows):
        rows = order[start : start + max_rows]
        written = _write(backbone, [tuple(prompts[row]) for row in rows], max_new_tokens, stop, temperature)
        for row, tokens in zip(rows, written, strict=True):
            answers[row] = _ended(tokens, stop)
    return answers


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
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        pad_token_id=pad, eos_token_id=list(stop) or None,
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
