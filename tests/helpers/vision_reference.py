"""What scores of prompts with images must equal: a forward pass for each candidate, on the processor's own inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from architectures import exclusive
from PIL import Image
from vision_models import FAMILIES, make_processor

from dso.decisions.decision import Decision
from dso.models.scores import Scores


def alone_with_images(name: str, model: torch.nn.Module, decisions: Sequence[Decision]) -> Scores:
    """The definition: each candidate in a forward pass of its own, with what a fresh processor makes of the prompt.

    The prompts are one user's message, or a string for a family without chats; candidates are one token a byte.
    """
    processor, family = make_processor(name), FAMILIES[name]
    width = max(len(decision.candidates) for decision in decisions)
    log_probs = torch.full((len(decisions), width), -torch.inf)
    lengths = torch.ones(len(decisions), width, dtype=torch.long)
    next_token, later, hidden = [], [], []
    for row, decision in enumerate(decisions):
        if isinstance(decision.prompt, str):
            text = decision.prompt.replace("<image>", family.slot)
        else:
            words = decision.prompt[0]["content"].replace("<image>", family.slot)
            text = f"<bos><user>{words}<assistant>"
        images = [[Image.open(path) for path in decision.images]]
        inputs = processor(images=images, text=[text], add_special_tokens=False, return_tensors="pt")
        inputs.pop("labels", None)
        start = inputs["input_ids"].shape[1] - 1
        behind: dict[tuple[int, ...], torch.Tensor] = {}
        answers = []
        for column, candidate in enumerate(decision.candidates):
            ids = processor.tokenizer(candidate.text, add_special_tokens=False, return_tensors="pt").input_ids
            output = model(**_followed_by(inputs, ids, name), output_hidden_states=True)
            table = output.logits[0].float().log_softmax(-1)
            answers.append(tuple(ids[0].tolist()))
            log_probs[row, column] = sum(table[start + place, token] for place, token in enumerate(answers[-1]))
            lengths[row, column] = ids.shape[1]
            behind |= {answers[-1][:place]: table[start + place] for place in range(ids.shape[1])}
        log_probs[row, : len(answers)] = exclusive(log_probs[row, : len(answers)], answers)
        first, *rest = behind.values()
        next_token.append(first)
        later += rest
        hidden.append(output.hidden_states[-1][0, start].detach().float())
    return Scores(log_probs, lengths, torch.stack([*next_token, *later]), torch.stack(hidden))


def _followed_by(inputs: dict[str, torch.Tensor], ids: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    """A prompt's inputs with an answer behind it: words, seen causally, with the images that the last word saw."""
    count, grown = ids.shape[1], dict(inputs)
    kinds = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 1 if name == "PaliGemma" else 0}
    grown["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    for key in kinds.keys() & inputs.keys():
        grown[key] = torch.nn.functional.pad(inputs[key], (0, count), value=kinds[key])
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        grown["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, count, -1, -1)], 1)
    return grown
