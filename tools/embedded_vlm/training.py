"""Training of the embedded model in two parts: its tower learns to see, then the language model to answer.

1. The vision tower is trained to tell what people look like (:mod:`tools.embedded_vlm.sight`).
2. The tower stays as it is. Projector and language model learn the answers to questions and the captions; the loss is
   the mean cross-entropy of the answers' tokens.

Step ``t`` depends on the seed, on ``t`` and on the state after step ``t - 1`` only, so that a training that was cut off
goes on bit for bit as it would have gone on.
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dso.files import write_bytes
from tools.embedded_vlm.batches import Corpus, answer_logits
from tools.embedded_vlm.corpus import words
from tools.embedded_vlm.model import PATCH, SIDE, build_model, build_processor
from tools.embedded_vlm.sight import Reader, patches

SAID_EVERY = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the shipped model was trained.

    Attributes:
        scenes: in the corpus.
        sight_steps, steps: of the two parts.
        sight_batch, batch: scenes a step.
        sight_rate, rate: learning rates.
        roles, looks: questions of each kind about a scene, a step.
        caption_every: in every so many-th step captions are learned instead of looks.
        save_every: steps; what a training that is cut off has to do again.
    """

    scenes: int = 6_000
    sight_steps: int = 300
    sight_batch: int = 64
    sight_rate: float = 3e-3
    steps: int = 1_500
    batch: int = 32
    rate: float = 2e-3
    roles: int = 4
    looks: int = 2
    caption_every: int = 5
    warmup: int = 50
    weight_decay: float = 0.05
    seed: int = 0
    save_every: int = 50


class Training:
    """A training and what it needs to go on: the model, its optimisers, the steps done.

    Args:
        recipe: what is done.
        folder: where its state is kept; a state of another recipe there is not used.
    """

    def __init__(self, recipe: Recipe, folder: str | Path):
        self.recipe, self._file = recipe, Path(folder) / "state.pt"
        self.processor = build_processor(words())
        self.model = build_model(len(self.processor.tokenizer), recipe.seed).train()
        tower = self.model.model.vision_tower
        self.reader = Reader(tower.config.hidden_size, SIDE // PATCH)
        seeing = [*tower.parameters(), *self.reader.parameters()]
        answering = [p for name, p in self.model.named_parameters() if "vision_tower" not in name]
        self.optimizers = [
            torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
            for parameters, rate in ((seeing, recipe.sight_rate), (answering, recipe.rate))
        ]
        self.done, self.seconds = 0, 0.0
        self._load()

    def run(self, say: Callable[[str], None] = print) -> Any:
        """Train to the last step; returns the model."""
        recipe = self.recipe
        started = time.process_time() - self.seconds
        corpus = Corpus(recipe.scenes, recipe.seed, self.processor.tokenizer)
        say(f"{recipe.scenes} scenes drawn; {self.done} of {recipe.sight_steps} + {recipe.steps} steps are done")
        shown: list[tuple[float, float]] = []
        seen: Tensor | None = None
        while self.done < recipe.sight_steps + recipe.steps:
            if self.done < recipe.sight_steps:
                shown.append(self._see(corpus))
            else:
                seen = self._all_patches(corpus) if seen is None else seen
                shown.append(self._answer(corpus, seen))
            self.done += 1
            last = self.done in (recipe.sight_steps, recipe.sight_steps + recipe.steps)
            self.seconds = time.process_time() - started
            if self.done % SAID_EVERY == 0 or last:
                loss, right = np.mean(shown, axis=0)
                say(f"step {self.done}: loss {loss:.3f}, right {right:.3f}, {self.seconds:.0f} s of processor time")
                shown = []
            if self.done % recipe.save_every == 0 or last:
                self._save()
        return self.model.eval()

    def _see(self, corpus: Corpus) -> tuple[float, float]:
        """A step of the first part; its loss, and the share of attributes that were read rightly."""
        _, rows, mirrored = self._drawn(corpus, self.recipe.sight_batch)
        told = corpus.labels[rows]
        told[mirrored] = told[mirrored].flip(1)
        loss, right = self.reader(patches(self.model, corpus.pixels(rows, mirrored)), told)
        self._update(0, loss, self.done, self.recipe.sight_steps)
        return loss.item(), right.item()

    def _answer(self, corpus: Corpus, seen: Tensor) -> tuple[float, float]:
        """A step of the second part; its loss, and how many answers left or right were as told."""
        recipe = self.recipe
        rng, rows, mirrored = self._drawn(corpus, recipe.batch)
        caption = self.done % recipe.caption_every == recipe.caption_every - 1
        branches = [
            corpus.branches(rng, row, turned, recipe.roles, recipe.looks, caption)
            for row, turned in zip(rows.tolist(), mirrored.tolist(), strict=True)
        ]
        logits, targets = answer_logits(self.model, seen[mirrored.astype(int), rows], branches)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        self._update(1, loss, self.done - recipe.sight_steps, recipe.steps)
        sides = torch.isin(targets, corpus.sides)
        return loss.item(), (logits[sides].argmax(-1) == targets[sides]).float().mean().item()

    def _drawn(self, corpus: Corpus, count: int) -> tuple[np.random.Generator, np.ndarray, np.ndarray]:
        """The step's generator, its scenes and which of them are mirrored."""
        rng = np.random.default_rng([self.recipe.seed, self.done])
        return rng, rng.integers(len(corpus), size=count), rng.random(count) < 0.5

    def _update(self, part: int, loss: Tensor, step: int, steps: int) -> None:
        optimizer = self.optimizers[part]
        rate = (self.recipe.sight_rate, self.recipe.rate)[part]
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps, self.recipe.warmup)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()

    @torch.no_grad()
    def _all_patches(self, corpus: Corpus) -> Tensor:
        """(2, N, P, d) the tower's output for every scene, as it is and mirrored."""
        parts = np.array_split(np.arange(len(corpus)), -(-len(corpus) // 256))
        return torch.stack(
            [
                torch.cat([patches(self.model, corpus.pixels(rows, np.full(len(rows), turned))) for rows in parts])
                for turned in (False, True)
            ]
        )

    def _load(self) -> None:
        if not self._file.is_file():
            return
        saved = torch.load(self._file, weights_only=True)
        if saved["recipe"] != asdict(self.recipe):
            return
        self.model.load_state_dict(saved["model"])
        self.reader.load_state_dict(saved["reader"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.done, self.seconds = saved["done"], saved["seconds"]

    def _save(self) -> None:
        data = io.BytesIO()
        state = {"recipe": asdict(self.recipe), "done": self.done, "seconds": self.seconds}
        state |= {"model": self.model.state_dict(), "reader": self.reader.state_dict()}
        torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}, data)
        write_bytes(self._file, data.getvalue())


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at a step: a linear rise, then half a cosine down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
