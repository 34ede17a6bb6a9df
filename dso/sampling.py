"""Sampled answers: what a model writes, not what it would give a candidate.

Answers are drawn at a temperature from the whole distribution (no nucleus, no top-k: what is sampled from is what the
policy gradient differentiates), and each ends at an end token or at the length limit. The answers to one prompt share
its forward pass: its keys and values are computed once and copied to every row that goes on from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dso.backbone import Backbone
from dso.scoring import Encoded, kl_divergence, token_logits
from dso.steering import Handle

Tokens = Sequence[int]


@torch.no_grad()
def sample(
    model,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop: Sequence[int],
    temperature: float = 1.0,
    shared: bool = True,
    max_rows: int = 256,
) -> list[list[int]]:
    """One answer to each prompt, as the model is now; a prompt that is given n times gets n answers.

    Args:
        prompts: token ids, none empty.
        stop: the end tokens; the one that ended an answer is its last token.
        shared: compute equal prompts once, for models whose whole state is in keys and values.
        max_rows: answers that are written side by side.

    Returns:
        the new tokens of each answer, 1 to ``max_new_tokens``, in the order of the prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), tuple(prompts[index])))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), max_rows):
        rows = order[start : start + max_rows]
        written = _write(model, [prompts[row] for row in rows], max_new_tokens, list(stop), temperature, shared)
        for row, tokens in zip(rows, written, strict=True):
            answers[row] = _ended(tokens, stop)
    return answers


def _write(
    model, prompts: Sequence[Tokens], max_new_tokens: int, stop: list[int], temperature: float, shared: bool
) -> list[list[int]]:
    from transformers import GenerationConfig

    device = model.get_input_embeddings().weight.device
    pad = stop[0] if stop else 0
    different = list(dict.fromkeys(map(tuple, prompts)))
    number = {prompt: place for place, prompt in enumerate(different)}
    ids, mask = (tensor.to(device) for tensor in _left_padded(different, pad))
    copies = torch.tensor([number[tuple(prompt)] for prompt in prompts], device=device)
    options = {}
    if shared and ids.shape[1] > 1:
        cache = model(  # the last token is left for the generation to begin with
            input_ids=ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask[:, :-1].cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        cache.batch_select_indices(copies)
        options["past_key_values"] = cache
    config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        pad_token_id=pad, eos_token_id=stop or None,
    )  # fmt: skip
    own, model.generation_config = model.generation_config, GenerationConfig()  # a repetition penalty would come in
    try:
        output = model.generate(ids[copies], attention_mask=mask[copies], generation_config=config, **options)
    finally:
        model.generation_config = own
    return output[:, ids.shape[1] :].tolist()


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
    for rows, packed in backbone.passes(encoded):
        chosen = [encoded[row] for row in rows]
        reads, steered = token_logits(backbone.model, chosen, packed)
        handle.scale = 0.0
        try:
            _, base = token_logits(backbone.model, chosen, packed)
        finally:
            handle.scale = scale
        divergence = kl_divergence(steered.float().log_softmax(-1), base.float().log_softmax(-1))
        for row, read in zip(rows, reads, strict=True):
            found[row] = float(divergence[read].mean())
    return found
