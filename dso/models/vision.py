"""Prompts with images, as a vision-language model reads them.

The model's own processor turns text and images into inputs: token ids in which every image takes many tokens, further
inputs that have a value for each token (token types, cross-attention masks), and the images' tensors. The first two are
small and kept with the encoded prompt. The tensors, which the processor takes longest to make, are remembered by the
files they came from, up to a bound in bytes, and made again when they were forgotten.

Nothing is ever truncated: a prompt that is longer than the model's context is refused where it is encoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dso.decisions.images import ImageFile, ImageMemory, open_image
from dso.errors import UserError, first_line
from dso.models.prompts import Prompt, chat_template, render_images

IMAGE_MEMORY = 512 * 2**20
_KINDS = (
    "image", "video", "audio", "vision", "boi", "eoi", "vision_start", "vision_end", "image_start", "image_end",
    "start_image", "end_image", "context_image", "fake_image", "global_image",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageInputs:
    """What a prompt with images brings besides its T token ids.

    Attributes:
        tokens: inputs (1, T + n, ...) with a value for each token of the prompt and of n tokens of an answer.
        load: gives the images' tensors.
        shapes: of those tensors, without their first dimension, along which prompts of equal shapes are joined.
    """

    tokens: dict[str, Tensor]
    load: Callable[[], dict[str, Tensor]]
    shapes: tuple[tuple[str, torch.Size], ...]


class _Replayed:
    """An image processor that is asked once about the same images; all else is the processor's own."""

    def __init__(self, part: Any):
        self._part = part
        self.made: list[Any] = []
        self._next = -1  # of what was made before; -1 while it is made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def begin(self, made: list[Any] | None) -> None:
        """Start over: with what an earlier call made of the same images, or anew."""
        self.made, self._next = (made, 0) if made is not None else ([], -1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._next < 0:
            self.made.append(self._part(*args, **kwargs))
            return copy.copy(self.made[-1])  # the processor takes entries out of what it is given
        self._next += 1
        return copy.copy(self.made[self._next - 1])


class Vision:
    """The processor of a vision-language model, as :class:`dso.models.backbone.Backbone` uses it.

    Args:
        processor: the model's transformers processor, with ``tokenizer`` and ``image_processor``.
        model: the model itself.
        name: what errors call it.
        memory: bytes of image tensors that are kept.

    Raises:
        UserError: if the processor knows no token for an image.
    """

    def __init__(self, processor: Any, model: Any, name: str, memory: int = IMAGE_MEMORY):
        self._processor = copy.copy(processor)  # whose image part is replaced
        self._part = _Replayed(processor.image_processor)
        self._processor.image_processor = self._part
        self._model = model
        self._name = name
        self.memory = ImageMemory(memory)
        self.tokenizer = processor.tokenizer
        self.template = chat_template(processor) or chat_template(self.tokenizer)
        token = getattr(processor, "image_token", None) or getattr(self.tokenizer, "image_token", None)
        if not token:
            raise UserError(f"the processor of {name!r} has no token for an image; this model is not supported")
        self._token: str = token
        self._slot = self._around(model.config)
        self.forbidden = self._forbidden(processor)
        self.takes_text = self._takes_text()

    def _around(self, config: Any) -> str:
        """The image token between the start and end tokens that the config may name."""
        for start, end in (("vision_start", "vision_end"), ("image_start", "image_end")):
            ids = [getattr(config, f"{edge}_token_id", None) for edge in (start, end)]
            if all(isinstance(number, int) for number in ids):
                first, last = self.tokenizer.convert_ids_to_tokens(ids)
                if first and last:
                    return f"{first}{self._token}{last}"
        return self._token

    def _forbidden(self, processor: Any) -> list[int]:
        """The ids that stand for images and other inputs: generation never emits them."""
        names = [f"{kind}_token_{end}" for kind in _KINDS for end in ("id", "index", "ids")]
        ids: set[int] = set()
        for owner in (self._model.config, processor, self.tokenizer):
            for name in names:
                value = getattr(owner, name, None)
                ids.update(value if isinstance(value, list | tuple) else (value,))
        size = self._model.get_output_embeddings().out_features
        return sorted(i for i in ids if isinstance(i, int) and 0 <= i < size and i != self.tokenizer.eos_token_id)

    def _takes_text(self) -> bool:
        """Whether the processor takes a prompt without images; if not, the model knows no such prompt."""
        try:
            self._processor(text=["a"], return_tensors="pt")
        except ValueError:
            return False
        return True

    def render(self, prompt: Prompt, date: str) -> tuple[str, bool]:
        """The prompt's text with this model's image slots, and whether special tokens have to be added."""
        return render_images(prompt, self.tokenizer, self.template, self._token, self._slot, self._name, date)

    def read(
        self, text: str, special: bool, files: tuple[ImageFile, ...], answer: int, back: int = 0
    ) -> tuple[tuple[int, ...], ImageInputs]:
        """Token ids of a rendered prompt, and what its images bring.

        Args:
            answer: how many tokens of an answer will be run behind the prompt.
            back: tokens at the prompt's end that are left out, as they are the answer's.

        Raises:
            ImageError: on an image that cannot be used.
            UserError: if the processor refuses the images, or continues an input in no known way.
        """
        inputs, images = self._process(text, special, files)
        shapes = tuple((name, value.shape[1:]) for name, value in sorted(images.items()))
        ids = tuple(inputs.pop("input_ids")[0].tolist())
        eos = self.tokenizer.eos_token
        if special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and not text.endswith(eos):
            ids = ids[:-1]  # some tokenizers close a text with the end token; here it goes on
        ids = ids[: len(ids) - back]
        tokens = {name: value[:, : len(ids)] for name, value in inputs.items()}

        def load() -> dict[str, Tensor]:
            entry = self.memory.get(files)
            return entry["inputs"] if entry is not None else self._process(text, special, files)[1]

        return ids, ImageInputs(self._continued(tokens, len(ids) + answer), load, shapes)

    def _process(
        self, text: str, special: bool, files: tuple[ImageFile, ...]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The processor's inputs with a value for each token, and those of the images."""
        from PIL import Image

        known = self.memory.get(files)
        if known is None:
            pictures = [open_image(file.path) for file in files]
        else:  # their tensors are there; the processor asks for no more than images of that number and size
            pictures = [Image.new("1", size) for size in known["sizes"]]
        self._part.begin(None if known is None else known["made"])
        try:
            made = self._processor(
                images=[pictures], text=[text], add_special_tokens=special, return_tensors="pt", padding=False
            )
        except ValueError as error:
            reason = first_line(error)
            raise UserError(f"the processor of {self._name!r} refuses the prompt with its images: {reason}") from error
        length = made["input_ids"].shape[1]
        of_images = {name for part in self._part.made for name in part}
        tokens: dict[str, Tensor] = {}
        images: dict[str, Tensor] = {}
        for name, value in made.items():
            if name in ("attention_mask", "labels") or not isinstance(value, Tensor):
                continue
            is_token = name not in of_images and value.shape[:2] == (1, length)
            (tokens if is_token else images)[name] = value
        if known is None:
            self._remember(files, pictures, images)
        return tokens, images

    def _remember(self, files: tuple[ImageFile, ...], pictures: Sequence[Any], images: dict[str, Tensor]) -> None:
        made, size = self._part.made, 0
        for part in made:
            for name, value in part.items():
                if not isinstance(value, Tensor):
                    continue
                if name in images and images[name] is not value and torch.equal(images[name], value):
                    part[name] = images[name]  # a processor's copy: one is enough
                size += part[name].nbytes if images.get(name) is not part[name] else 0
        size += sum(value.nbytes for value in images.values())
        self.memory.put(files, {"made": made, "inputs": images, "sizes": [p.size for p in pictures]}, size)

    def _continued(self, tokens: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        """The inputs of a prompt grown to ``length`` tokens, by the rule by which the model itself generates."""
        grown = dict(tokens)
        for _ in range(length - next(iter(tokens.values())).shape[1] if tokens else 0):
            grown = self._model._update_model_kwargs_for_generation({}, grown, is_encoder_decoder=False)
        if strange := [name for name, value in grown.items() if value.shape[1] != length]:
            raise UserError(f"{self._name!r} takes an input {strange[0]!r} for each token, which no answer continues")
        return grown
