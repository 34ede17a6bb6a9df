"""The frozen model behind every decision: tokenising, scoring, generating.

Whether an architecture takes packed prefix trees (:mod:`dso.models.packing`) is not looked up but measured when the
model is loaded: both layouts must give the same log-probabilities, else padded rows are used. Packed rows are never
longer than a sliding window or a position table, so that what was measured holds for every row. Prompts with images
(:mod:`dso.models.vision`) are padded rows always.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any

import torch
from torch import Tensor

from dso.decisions.decision import IMAGE_SLOT, Decision, DecisionError
from dso.decisions.images import ImageFile, find_images
from dso.errors import UserError
from dso.models.loading import DTYPES, load_parts
from dso.models.prompts import Prompt, render_text
from dso.models.scoring import Encoded, Scores, passes, score
from dso.models.vision import IMAGE_MEMORY, ImageInputs, Vision

# A packed row's mask replaces the one that the model would have cut off at these distances.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention")


class Backbone:
    """A frozen causal language model, or vision-language model, with its tokenizer or processor.

    Args:
        model: a transformers model; its parameters are frozen and it is put into eval mode.
        tokenizer: its tokenizer.
        name: what checkpoints and tables call it.
        revision: the Hub revision it was loaded at, if any.
        max_tokens: tokens of one packed row, or of one padded batch.
        packing: whether to pack; None asks the model by comparing both layouts.
        processor: of a vision-language model; None for a text model, which takes no images.
        image_memory: bytes of processed images that are kept.
    """

    def __init__(
        self,
        model,
        tokenizer,
        name: str = "model",
        revision: str | None = None,
        max_tokens: int = 512,
        packing: bool | None = None,
        processor: Any = None,
        image_memory: int = IMAGE_MEMORY,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.max_tokens = max_tokens
        self.vision = Vision(processor, model, name, image_memory) if processor is not None else None
        self._encoded: dict[str, Encoded] = {}
        config = model.config.get_text_config()
        self._context = _positive(config, "max_position_embeddings")
        limits = [_positive(config, name) for name in (*WINDOWS, "max_position_embeddings")]
        self._row_limit = min((limit for limit in limits if limit), default=None)
        if packing is None:
            packing = (self.vision is None or self.vision.takes_text) and self._packing_is_exact()
        self.packing = packing

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        **options: Any,
    ) -> Backbone:
        """Load the embedded ``smollm2-135m``, a local folder or a Hub id.

        Raises:
            ModelNotFound: if there is no such model, or it is damaged; the message says what was looked for.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        model, tokenizer, processor = load_parts(name, revision, DTYPES[dtype])
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, name, revision, processor=processor, **options)

    @property
    def device(self) -> torch.device:
        return next(self.model.get_input_embeddings().parameters()).device

    def encode(self, decision: Decision) -> Encoded:
        """Token ids of the decision; the candidates are tokenised in their place behind the prompt.

        Raises:
            DecisionError: if two candidates have the same tokens, chat messages meet a tokenizer or processor without a
                chat template, the decision is longer than the model's context, or its images cannot be used.
        """
        try:
            files = self._files(decision.images)
            named = [[c.text for c in decision.candidates], *map(astuple, files)]
            key = json.dumps([decision.prompt, *named])
            if key not in self._encoded:
                self._encoded[key] = self._encode(decision, files)
            return self._encoded[key]
        except DecisionError:
            raise
        except UserError as error:
            raise DecisionError(f"decision {decision.id!r}: {error}") from error

    def _encode(self, decision: Decision, files: tuple[ImageFile, ...]) -> Encoded:
        text, special = self._render(decision.prompt)
        prompt = self._tokens(text, special)
        candidates = tuple(self._continuation(text, special, prompt, c.text) for c in decision.candidates)
        images = None
        if self.vision is not None and files:
            answer = max(map(len, candidates)) - 1
            whole, images = self.vision.read(text, special, files, answer)
            if whole[-1] != prompt[-1]:  # the processor ends prompts in its own way (PaliGemma's line feed)
                candidates = tuple(self._alone(c.text) for c in decision.candidates)
                images = self.vision.read(text, special, files, max(map(len, candidates)) - 1)[1]
            prompt, images = whole, replace(images, load=_for_decision(decision.id, images))
        if fault := self._fault(prompt, candidates):
            raise UserError(fault)
        return Encoded(prompt, candidates, images)

    def _files(self, images: Sequence[str]) -> tuple[ImageFile, ...]:
        if images and self.vision is None:
            raise UserError(f"it has images, but {self.name!r} is a text model; load a vision-language model")
        if not images and self.vision is not None and not self.vision.takes_text:
            raise UserError(f"it has no image, but {self.name!r} takes prompts with images only")
        return find_images(images)

    def _fault(self, prompt: tuple[int, ...], candidates: tuple[tuple[int, ...], ...]) -> str | None:
        if not prompt or not all(candidates):
            return "the tokenizer gives no tokens for the prompt or for a candidate"
        if len(set(candidates)) < len(candidates):
            return "two candidates have the same tokens"
        longest = len(prompt) + max(map(len, candidates)) - 1
        if self._context and longest > self._context:
            return f"{longest} tokens, but {self.name!r} takes at most {self._context}"
        return None

    def prompt_text(self, decision: Decision) -> str:
        """The prompt as the model will see it, chat template applied; an image is one slot."""
        try:
            return self._render(decision.prompt)[0]
        except UserError as error:
            raise DecisionError(f"decision {decision.id!r}: {error}") from error

    def _render(self, prompt: Prompt) -> tuple[str, bool]:
        """The prompt's text, and whether the tokenizer has to add its special tokens."""
        return self.vision.render(prompt) if self.vision else render_text(prompt, self.tokenizer, self.name)

    def _tokens(self, text: str, special: bool) -> tuple[int, ...]:
        ids = tuple(self.tokenizer(text, add_special_tokens=special).input_ids)
        # Some tokenizers close a text with the end token; here it goes on.
        closed = special and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id
        return ids[:-1] if closed and not text.endswith(self.tokenizer.eos_token) else ids

    def _continuation(self, text: str, special: bool, prompt: tuple[int, ...], candidate: str) -> tuple[int, ...]:
        whole = self._tokens(text + candidate, special)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return whole[len(prompt) :]
        # The tokenizer merges across the boundary: the candidate alone is the only split that keeps the prompt.
        return self._alone(candidate)

    def _alone(self, candidate: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(candidate, add_special_tokens=False).input_ids)

    def score(self, decisions: Sequence[Decision], *, next_token: bool = False, hidden: bool = False) -> Scores:
        """Score N decisions with the model as it is now, steered or not (see :func:`dso.models.scoring.score`)."""
        return score(
            self.model,
            [self.encode(decision) for decision in decisions],
            packing=self.packing,
            max_tokens=self.max_tokens,
            row_limit=self._row_limit,
            next_token=next_token,
            hidden=hidden,
        )

    def passes(self, encoded: Sequence[Encoded]) -> Iterator[tuple[list[int], bool]]:
        """How encoded decisions are divided into forward passes (see :func:`dso.models.scoring.passes`)."""
        return passes(encoded, self.packing, self.max_tokens, self._row_limit)

    def fits(self, tokens: int) -> bool:
        """Whether a packed row may have so many tokens."""
        return self._row_limit is None or tokens <= self._row_limit

    def next_token(self, texts: Sequence[str]) -> Tensor:
        """(N, V) float32 log-probabilities of the token after each text."""
        candidates = ((0,),)  # one is needed, its score is not
        self._files(())
        encoded = []
        for text in texts:
            prompt = self._tokens(text, True)
            if fault := self._fault(prompt, candidates):
                raise UserError(f"text {text[:40]!r}: {fault}")
            encoded.append(Encoded(prompt, candidates))
        return score(
            self.model,
            encoded,
            packing=self.packing,
            max_tokens=self.max_tokens,
            row_limit=self._row_limit,
            next_token=True,
        ).next_token

    @torch.no_grad()
    def generate(self, prompt: Prompt, *, images: Sequence[str] = (), max_new_tokens: int = 64, **options: Any) -> str:
        """Continue a text or answer a chat, with the model as it is now; options go to transformers' generate.

        Args:
            images: paths, one for each ``<image>`` in the prompt. Image tokens are never generated.
        """
        words = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        if (slots := words.count(IMAGE_SLOT)) != len(images):
            raise UserError(f"the prompt has {slots} slot(s) {IMAGE_SLOT} for {len(images)} image(s)")
        files, (text, special) = self._files(images), self._render(prompt)
        inputs: dict[str, Tensor] = {}
        if self.vision is not None and files:
            tokens, seen = self.vision.read(text, special, files, 0)
            inputs = seen.tokens | seen.load()
        else:
            tokens = self._tokens(text, special)
        if not tokens:
            raise UserError("the prompt is empty")
        if self.vision is not None:
            options["suppress_tokens"] = sorted({*options.get("suppress_tokens", ()), *self.vision.forbidden})
        ids = torch.tensor([tokens], device=self.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            **{k: v.to(self.device, self.model.dtype if v.is_floating_point() else None) for k, v in inputs.items()},
            **{"do_sample": False, **options},
        )
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def _packing_is_exact(self) -> bool:
        """Whether a packed row of branching prompts gives the log-probabilities of padded rows.

        All prompts end in the same token, so that what separates them came through attention: a wrong mask or
        position is of that size, rounding is far below it.
        """
        if self.model.config.get_text_config()._attn_implementation not in ("eager", "sdpa"):
            return False
        probes = _probes(self.model.get_input_embeddings().num_embeddings, self._row_limit or 512)
        try:
            packed, padded = (
                score(self.model, probes, packing=packing, max_tokens=512, next_token=True).next_token
                for packing in (True, False)
            )
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the architecture refuses a token-to-token mask
        error = (packed - padded).square().mean().sqrt()
        spread = (padded - padded.mean(0)).square().mean().sqrt()
        return bool(error < spread * (1e-3 if self.model.dtype == torch.float32 else 5e-2))


def _probes(vocabulary: int, row_limit: int) -> list[Encoded]:
    """Up to 16 prompts of 6 tokens that differ in the fourth and fifth, together at most ``row_limit`` tokens.

    The more there are, the farther a token's place in the row is from its position in the prompt.
    """
    probes = []
    for number in range(max(2, min(16, (row_limit - 3) // 4))):
        ids = [(7 * number + 5 * place + 11) % vocabulary for place in range(5)]
        prompt = (1 % vocabulary, 2 % vocabulary, 3 % vocabulary, *ids[:2], 4 % vocabulary)
        probes.append(Encoded(prompt, ((ids[2],), (ids[3], ids[4]))))
    return probes


def _positive(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def _for_decision(name: str, images: ImageInputs) -> Callable[[], dict[str, Tensor]]:
    """The images' tensors; an error names the decision."""

    def load() -> dict[str, Tensor]:
        try:
            return images.load()
        except UserError as error:
            raise DecisionError(f"decision {name!r}: {error}") from error

    return load
