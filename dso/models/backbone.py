"""The frozen model behind every decision: tokenising, scoring, generating.

How decisions share a forward pass is measured when the model is taken in (:mod:`dso.models.layout`). Prompts with
images (:mod:`dso.models.vision`) are padded rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dso.decisions.decision import IMAGE_SLOT, Decision, DecisionError
from dso.decisions.images import ImageFile, find_images
from dso.errors import UserError
from dso.models.encoded import Encoded, Positions, answer_positions
from dso.models.layout import Company, find_company, find_layout, positive, row_limit
from dso.models.loading import load_parts
from dso.models.prompts import Prompt, chat_template, render_text, template_digest
from dso.models.scores import Scores, Scoring
from dso.models.scoring import Layout, passes, score
from dso.models.tokens import tokenise, tokenise_answers, tokenise_behind
from dso.models.vision import IMAGE_MEMORY, ImageInputs, Vision


class Backbone:
    """A frozen causal language model, or vision-language model, with its tokenizer or processor.

    Args:
        model: a transformers model; its parameters are frozen and it is put into eval mode.
        tokenizer: its tokenizer.
        name: what checkpoints and tables call it.
        revision: the Hub revision it was loaded at, if any.
        max_tokens: tokens of one packed row, or of one padded batch.
        layout: how decisions share a forward pass: ``packed``, ``padded`` or ``single``; None finds the best one.
        processor: of a vision-language model; None for a text model, which takes no images.
        image_memory: bytes of processed images that are kept.
        scoring: the rule by which decisions are scored, such as a steering's ``config.scoring``.

    Attributes:
        context: tokens that the model takes at most; None where its config states no limit.
        layout: in use.
        layout_reason: why it is no better one; "" where it is the best, or was chosen.

    Raises:
        UserError: if the model cannot be run, or ``layout`` is none.
    """

    def __init__(
        self,
        model,
        tokenizer,
        name: str = "model",
        revision: str | None = None,
        max_tokens: int = 512,
        layout: Layout | None = None,
        processor: Any = None,
        image_memory: int = IMAGE_MEMORY,
        scoring: Scoring | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.max_tokens = max_tokens
        self.vision = Vision(processor, model, name, image_memory) if processor is not None else None
        self._encoded: dict[str, Encoded] = {}
        self._stated = scoring or Scoring()
        config = model.config.get_text_config()
        self.context = positive(config, "max_position_embeddings")
        self._row_limit = row_limit(config)
        self.layout_reason = ""
        if layout is None and (self.vision is None or self.vision.takes_text):
            layout, self.layout_reason = find_layout(model, self._row_limit)
        self.layout: Layout = layout or "padded"
        if self.layout not in ("packed", "padded", "single"):
            raise UserError(f"layout is {layout!r}, expected packed, padded or single")

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str | None = None,
        attn_implementation: str | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        **options: Any,
    ) -> Backbone:
        """Load the embedded ``smollm2-135m``, a local folder or a Hub id.

        Args:
            dtype: ``float32``, ``bfloat16`` or ``float16``.
            device: where the model goes; the first GPU, else the CPU, by default.
            attn_implementation, device_map, quantization_config: of transformers' ``from_pretrained``. With the last
                two the loader places the model.
            options: further arguments of the class.

        Raises:
            ModelNotFound: if there is no such model, or it is damaged; the message says what was looked for.
            UserError: if an option cannot be used.
        """
        placed = device_map is not None or quantization_config is not None
        if device is not None and placed:
            raise UserError(f"device {device!r} and a device_map or quantization_config: the loader places the model")
        loaders = {
            "attn_implementation": attn_implementation,
            "device_map": device_map,
            "quantization_config": quantization_config,
        }
        wanted = {key: value for key, value in loaders.items() if value is not None}
        model, tokenizer, processor = load_parts(name, revision, dtype, **wanted)
        if not placed:
            model = model.to(usable_device(device))
        return cls(model, tokenizer, name, revision, processor=processor, **options)

    @property
    def scoring(self) -> Scoring:
        """The rule in use, with the digest of the model's own chat template where none was stated."""
        return self._stated if self._stated.template else replace(self._stated, template=self._template())

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return next(self.model.get_input_embeddings().parameters()).device

    @cached_property
    def company(self) -> Company:
        """Which prompts are answered side by side (:func:`dso.models.layout.find_company`); found out when it is first
        asked for."""
        return "none" if self.layout == "single" else find_company(self.model, self.device)

    def layout_line(self) -> str | None:
        """What is to be said of a layout that is slower than the best one; None where it is the best."""
        rows = {"padded": "padded rows", "single": "rows of their own"}
        if not self.layout_reason:
            return None
        return f"{self.name}: prompts are scored in {rows[self.layout]}, not packed: {self.layout_reason}"

    def encode(self, decision: Decision, keep: bool = True) -> Encoded:
        """Token ids of the decision; what they say is prompt + candidate, letter for letter.

        Args:
            keep: them, for as long as the backbone lives.

        Raises:
            DecisionError: if two candidates have the same tokens, the tokenizer drops blanks between prompt and
                candidate, a chat template is missing or drops a message, the decision is longer than the model's
                context, or its images cannot be used.
        """
        try:
            files = self._files(decision.images)
            named = [[c.text for c in decision.candidates], *map(astuple, files)]
            key = json.dumps([decision.prompt, *named])
            encoded = self._encoded.get(key) or self._encode(decision, files)
            if keep:
                self._encoded[key] = encoded
            return encoded
        except DecisionError:
            raise
        except UserError as error:
            raise DecisionError(f"decision {decision.id!r}: {error}") from error

    def _encode(self, decision: Decision, files: tuple[ImageFile, ...]) -> Encoded:
        text, special = self._render(decision.prompt)
        texts = [c.text for c in decision.candidates]
        prompt, candidates, back = tokenise_answers(self.tokenizer, text, special, texts)
        images = None
        if self.vision is not None and files:
            answer = max(map(len, candidates)) - 1
            whole, images = self.vision.read(text, special, files, answer, back)
            if whole[-1:] != prompt[-1:]:  # the processor ends prompts in its own way (PaliGemma's line feed)
                whole, _ = self.vision.read(text, special, files, 0)
                candidates = tuple(tokenise_behind(self.tokenizer, whole[-1], words) for words in texts)
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
        if self.context and longest > self.context:
            return f"{longest} tokens, but {self.name!r} takes at most {self.context}"
        return None

    def prompt_text(self, decision: Decision) -> str:
        """The prompt as the model will see it, chat template applied; an image is one slot."""
        try:
            return self._render(decision.prompt)[0]
        except UserError as error:
            raise DecisionError(f"decision {decision.id!r}: {error}") from error

    def _template(self) -> str:
        return template_digest(self.vision.template if self.vision else chat_template(self.tokenizer))

    def _render(self, prompt: Prompt) -> tuple[str, bool]:
        """The prompt's text, and whether the tokenizer has to add its special tokens."""
        date, template = self._stated.date, self._stated.template
        if not isinstance(prompt, str) and template and self._template() not in ("", template):
            raise UserError(
                f"the prompt is a chat, and the chat template of {self.name!r} is not the one that the scoring states; "
                "use the tokenizer that the steering was trained with"
            )
        return self.vision.render(prompt, date) if self.vision else render_text(prompt, self.tokenizer, self.name, date)

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a text or a chat without images.

        Raises:
            UserError: if it is empty, or the model takes prompts with images only.
        """
        require_slots(prompt, 0)
        self._files(())
        if not (found := tokenise(self.tokenizer, *self._render(prompt))):
            raise UserError("the prompt is empty")
        return found

    def score(
        self, decisions: Sequence[Decision], *, next_token: bool = False, hidden: bool = False, keep: bool = True
    ) -> Scores:
        """Score N decisions with the model as it is now, steered or not (see :func:`dso.models.scoring.score`).

        Args:
            keep: of :meth:`encode`.
        """
        return self._score([self.encode(decision, keep) for decision in decisions], next_token, hidden)

    def _score(self, encoded: Sequence[Encoded], next_token: bool, hidden: bool = False) -> Scores:
        return score(
            self.model,
            encoded,
            layout=self.layout,
            max_tokens=self.max_tokens,
            row_limit=self._row_limit,
            next_token=next_token,
            hidden=hidden,
            scoring=self.scoring,
        )

    def positions(self, decisions: Sequence[Decision]) -> Positions:
        """The answer positions of N decisions, as the rows of their next-token distributions stand."""
        return answer_positions([self.encode(decision) for decision in decisions])

    def passes(self, encoded: Sequence[Encoded]) -> Iterator[tuple[list[int], Layout]]:
        """How encoded decisions are divided into forward passes (see :func:`dso.models.scoring.passes`)."""
        return passes(encoded, self.layout, self.max_tokens, self._row_limit)

    def fits(self, tokens: int) -> bool:
        """Whether a packed row may have so many tokens."""
        return self._row_limit is None or tokens <= self._row_limit

    def next_token(self, texts: Sequence[str]) -> Tensor:
        """(N, V) float32 log-probabilities of the token after each text."""
        candidates = ((0,),)  # one is needed, its score is not
        self._files(())
        encoded = []
        for text in texts:
            prompt = tokenise(self.tokenizer, text, True)
            if fault := self._fault(prompt, candidates):
                raise UserError(f"text {text[:40]!r}: {fault}")
            encoded.append(Encoded(prompt, candidates))
        table = self._score(encoded, True).next_token
        assert table is not None  # it was asked for
        return table

    def likelihood(self, texts: Sequence[str], start: bool = True, next_token: bool = False) -> Scores:
        """Score N whole texts with the model as it is now, as one "candidate" each: (N, 1).

        Args:
            start: count every token, the first one behind the token that begins a text (lm-evaluation-harness's rule);
                otherwise those behind the first one.
            next_token: keep the distributions of the tokens that count.

        Raises:
            UserError: of :meth:`encode_texts`.
        """
        return self._score(self.encode_texts(texts, start), next_token)

    def encode_texts(self, texts: Sequence[str], start: bool = True) -> list[Encoded]:
        """Tokenise N whole texts as :meth:`likelihood` scores them, one "candidate" each.

        Raises:
            UserError: if a text is empty or too long, or the tokenizer has no token that begins or ends a text.
        """
        begin = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        if start and begin is None:
            raise UserError(f"the tokenizer of {self.name!r} has no token that begins a text, nor one that ends it")
        self._files(())
        encoded = []
        for text in texts:
            ids = tokenise(self.tokenizer, text, not start)
            prompt, rest = ((begin,), ids) if start else (ids[:1], ids[1:])
            if fault := self._fault(prompt, (rest,)):
                raise UserError(f"text {text[:40]!r}: {fault}")
            encoded.append(Encoded(prompt, (rest,)))
        return encoded

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, *, images: Sequence[str] = (), max_new_tokens: int = 64, **options: Any
    ) -> str | list[str]:
        """Continue a text or answer a chat, with the model as it is now; options go to transformers' generate.

        Args:
            images: paths, one for each ``<image>`` in the prompt. Image tokens are never generated.

        Returns:
            what was generated; with ``num_return_sequences`` above 1 a list of so many.
        """
        if options.get("return_dict_in_generate"):
            raise UserError("generate returns text; for anything else call the model's own generate (backbone.model)")
        require_slots(prompt, len(images))
        files, (text, special) = self._files(images), self._render(prompt)
        inputs: dict[str, Tensor] = {}
        if self.vision is not None and files:
            tokens, seen = self.vision.read(text, special, files, 0)
            inputs = seen.tokens | seen.load()
        else:
            tokens = tokenise(self.tokenizer, text, special)
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
        made = self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return made if options.get("num_return_sequences", 1) > 1 else made[0]


def require_slots(prompt: Prompt, images: int) -> None:
    """Raise UserError unless the prompt has a slot for each image."""
    words = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    if (slots := words.count(IMAGE_SLOT)) != images:
        raise UserError(f"the prompt has {slots} slot(s) {IMAGE_SLOT} for {images} image(s)")


def usable_device(device: str | None) -> str:
    """A device by its name, or the first GPU, else the CPU.

    Raises:
        UserError: if torch knows no such device, or it is not there.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with the device
        raise UserError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _for_decision(name: str, images: ImageInputs) -> Callable[[], dict[str, Tensor]]:
    """The images' tensors; an error names the decision."""

    def load() -> dict[str, Tensor]:
        try:
            return images.load()
        except UserError as error:
            raise DecisionError(f"decision {name!r}: {error}") from error

    return load
