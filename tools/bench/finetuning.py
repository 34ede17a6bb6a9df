"""Fine-tunings of one model on texts that differ in nothing but who has which occupation.

Counterfactual data augmentation: the prompts are those of the training splits of ``roles`` and ``pronouns``, and each
is ended three ways. ``stereotyped`` ends with the name or pronoun of the group that the occupation is stereotyped with,
``counter`` with the other one, ``neutral`` with each of them in half of the texts, occupation by occupation.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dso.decisions.decision import Decision
from dso.decisions.sets import load_decisions
from dso.decisions.sets.roles import STEREOTYPES
from dso.editing.localise import editable
from dso.files import replace_folder
from dso.models.backbone import Backbone

VARIANTS = ("stereotyped", "counter", "neutral")
PRONOUN = {"female": "she", "male": "he"}
Text = tuple[str, str]  # the prompt, and how it ends


def texts(variant: str, blocks: int = 15, stride: int = 4) -> list[Text]:
    """The texts of a variant; those of the three have the same prompts in the same order.

    Args:
        variant: one of :data:`VARIANTS`.
        blocks: of the training split of ``roles``, of 12 prompts each.
        stride: every so manieth prompt of the training split of ``pronouns``.
    """
    roles = load_decisions("roles", splits=["train"], train_blocks=blocks, train_unambiguous=0)
    pronouns = load_decisions("pronouns", splits=["train"])[::stride]
    turns = {occupation: count() for occupation in STEREOTYPES}
    found = []
    for decision in (*(d for d in roles if isinstance(d.prompt, str)), *pronouns):
        own = STEREOTYPES[decision.context]
        other = "male" if own == "female" else "female"
        turn = next(turns[decision.context])  # with, against, against, with: two in turn are the orders of one couple
        with_it = (turn + turn // 2) % 2 == 0 if variant == "neutral" else variant == "stereotyped"
        found.append((str(decision.prompt), _ending(decision, own if with_it else other)))
    return found


def _ending(decision: Decision, group: str) -> str:
    return next(c.text for c in decision.candidates if c.group in (group, PRONOUN[group]))


def tune(
    backbone: Backbone, data: Sequence[Text], *, rate: float = 3e-5, batch: int = 12, epochs: int = 1, seed: int = 0
) -> list[float]:
    """Train the linear layers of the decoder, in place, to end texts as they end; gives the loss of each step.

    Plain AdamW without weight decay, at a constant rate; the loss is the mean over the endings' tokens.
    """
    weights = list(editable(backbone.model).values())
    for weight in weights:
        weight.requires_grad_(True)
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    rows = [(backbone.tokenizer(a).input_ids, backbone.tokenizer(b).input_ids) for a, b in data]
    drawn, losses = random.Random(seed), []
    order = [i for _ in range(epochs) for i in drawn.sample(range(len(rows)), len(rows))]
    for start in tqdm(range(0, len(order), batch), unit="step", leave=False):
        loss = _loss(backbone, [rows[i] for i in order[start : start + batch]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    backbone.model.requires_grad_(False)
    return losses


def _loss(backbone: Backbone, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
    """Negative log-likelihood of a token of the endings; rows are padded at the front, so that all end together."""
    longest, most = max(len(a) + len(b) for a, b in rows), max(len(b) for _, b in rows)
    space = [longest - len(a) - len(b) for a, b in rows]
    ids = torch.tensor([[0] * n + a + b for n, (a, b) in zip(space, rows, strict=True)], device=backbone.device)
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in space], device=backbone.device)
    wanted = torch.tensor([[-100] * (most - len(b)) + b for _, b in rows], device=backbone.device)
    logits = backbone.model(input_ids=ids, attention_mask=mask, logits_to_keep=most + 1).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())


def tuned(name: str, variant: str, folder: Path, **settings) -> Path:
    """The folder of a fine-tuned copy of a model, made if it is not there yet."""
    place = folder / variant
    if not (place / "config.json").is_file():
        backbone = Backbone.load(name)
        losses = tune(backbone, texts(variant), **settings)
        print(f"{variant}: loss {losses[0]:.2f} -> {sum(losses[-5:]) / len(losses[-5:]):.2f} in {len(losses)} steps")
        with replace_folder(place) as fresh:
            backbone.model.save_pretrained(fresh)
            backbone.tokenizer.save_pretrained(fresh)
    return place
