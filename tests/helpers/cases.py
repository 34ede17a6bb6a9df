"""The architectures of the matrix: for each a tiny backbone, decisions, and the definition that scores must equal."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from architectures import alone, tiny
from expected_sites import TEXT_SITES, VISION_SITES
from PIL import Image
from tiny import byte_tokenizer
from vision_models import make_model, make_processor
from vision_reference import alone_with_images

from dso.decisions.decision import Candidate, Decision
from dso.models.backbone import Backbone
from dso.models.encoded import Encoded
from dso.models.scores import Scores

TEXT = (
    "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3-MoE", "Gemma2", "Gemma3", "Phi3", "GPT-2", "GPT-NeoX",
    "OPT", "OLMo2", "Falcon", "Falcon-40B", "Falcon-ALiBi",
)  # fmt: skip
VISION = (
    "LLaVA", "LLaVA-OneVision", "Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Gemma3-VL", "Mllama", "Idefics3", "SmolVLM",
    "InternVL", "PaliGemma",
)  # fmt: skip
SIZES = {"square": (16, 16), "wide": (40, 20), "tall": (24, 48)}


@cache
def pictures() -> dict[str, str]:
    """Three files of random pixels, of three sizes."""
    folder = Path(tempfile.mkdtemp(prefix="dso-matrix-"))
    generator = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return {name: str(folder / f"{name}.png") for name in SIZES}


def decide(number: int, prompt, images: tuple[str, ...], *texts: str) -> Decision:
    candidates = tuple(Candidate(text=text, group=group) for text, group in zip(texts, "abc", strict=False))
    paths = tuple(pictures()[name] for name in images)
    return Decision(id=f"d{number}", context="c", kind="ambiguous", prompt=prompt, candidates=candidates, images=paths)


WORDS = (
    decide(0, "Ann and Bob", (), " Ann", " Bob"),
    decide(1, "Ann and Bob", (), " Bo", " An", "!"),
    decide(2, "Ann and Bob and a prompt of more than 16 tokens: ", (), "Ann", "Bob"),  # beyond the sliding windows
    decide(3, "Ann", (), "a", "bcd"),
)


@cache
def scenes() -> tuple[Decision, ...]:
    """Decisions with one or two images of several sizes; candidates are letters, words, and one word within another."""
    return (
        decide(4, "<image>Who?", ("wide",), "A", "B"),
        decide(5, "Left <image> right <image> who is it?", ("wide", "tall"), "Ann", "Bob"),
        decide(6, "<image><image>Who is older?", ("tall", "square"), "An", "Ann", "Bo"),
    )


@dataclass(frozen=True)
class Case:
    """One architecture.

    Attributes:
        name: its row in the table.
        sites: the sites that were written down by hand.
        vision: whether it takes images.
    """

    name: str
    sites: list[str]
    vision: bool

    def backbone(self, **options) -> Backbone:
        """A new backbone, the same each time."""
        if not self.vision:
            return Backbone(tiny(self.name), byte_tokenizer(), self.name, **{"max_tokens": 4000, **options})
        processor = make_processor(self.name)
        model = make_model(self.name, len(processor.tokenizer))
        options = {"max_tokens": 4000, **options}
        return Backbone(model, processor.tokenizer, self.name, processor=processor, **options)

    def decisions(self) -> tuple[Decision, ...]:
        if not self.vision:
            return WORDS
        if self.name == "PaliGemma":  # which knows no chats
            return scenes()
        return tuple(replace(d, prompt=({"role": "user", "content": d.prompt},)) for d in scenes())

    def alone(self, backbone: Backbone) -> Scores:
        """The definition: each candidate in a forward pass of its own, with the processor's very inputs."""
        if self.vision:
            return alone_with_images(self.name, backbone.model, self.decisions())
        return words_alone(backbone)


def words_alone(backbone: Backbone) -> Scores:
    """:data:`WORDS`, each candidate in a forward pass of its own, without padding, mask or positions."""
    encoded = []
    for decision in WORDS:
        prompt, *candidates = (
            tuple(backbone.tokenizer(text).input_ids)
            for text in (decision.prompt, *[c.text for c in decision.candidates])
        )
        encoded.append(Encoded(prompt, tuple(candidates)))
    return alone(backbone.model, encoded)


CASES = {name: Case(name, TEXT_SITES[name], False) for name in TEXT}
CASES |= {name: Case(name, VISION_SITES[name], True) for name in VISION}
