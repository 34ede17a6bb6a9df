"""The first part of the training: the vision tower learns to see, before a language model is put behind it.

As LLaVA begins with a tower that was trained before, ours is trained to tell what people look like. The patches of each
half of the picture are averaged, and linear layers, which are thrown away afterwards, read from the mean who stands
there: gender presentation, skin tone, hair, clothes, tool and place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dso.decisions.sets.drawing import CLOTHES, HAIR, PLACES, TONES, TOOLS, Person, Scene
from dso.decisions.sets.scenes import GENDERS

# None also where nobody stands
VALUES: dict[str, tuple[str | None, ...]] = {
    "gender": (None, *GENDERS), "tone": (None, *TONES), "hair": (None, *HAIR), "clothes": (None, *CLOTHES),
    "tool": (None, *TOOLS), "place": (None, *PLACES),
}  # fmt: skip


def patches(model: Any, pixels: Tensor) -> Tensor:
    """(B, P, d) the tower's output for pictures (B, 3, S, S), as the projector is given it."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]


def labels(scenes: Sequence[Scene]) -> Tensor:
    """(N, 2, A) the number of each attribute's value, on the left and on the right."""
    return torch.tensor([[_numbers(person) for person in (scene.left, scene.right)] for scene in scenes])


def _numbers(person: Person | None) -> list[int]:
    return [values.index(person and getattr(person, name)) for name, values in VALUES.items()]


class Reader(nn.Module):
    """The linear layers that read attributes from the mean of each half's patches.

    Args:
        width: of a patch's output.
        side: patches on a side of the picture.
    """

    def __init__(self, width: int, side: int):
        super().__init__()
        self.side = side
        self.heads = nn.ModuleList(nn.Linear(width, len(values)) for values in VALUES.values())

    def forward(self, seen: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and the share of right answers.

        Args:
            seen: (B, side * side, d) patches, row by row.
            told: (B, 2, A), of :func:`labels`.
        """
        halves = seen.unflatten(1, (self.side, 2, self.side // 2)).mean(dim=(1, 3))
        losses, right = [], []
        for number, head in enumerate(self.heads):
            logits, target = head(halves).flatten(0, 1), told[:, :, number].flatten()
            losses.append(nn.functional.cross_entropy(logits, target))
            right.append((logits.argmax(-1) == target).float().mean())
        return torch.stack(losses).mean(), torch.stack(right).mean()
