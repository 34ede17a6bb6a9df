"""The frozen model behind every decision: loading, tokenising, scoring, generating.

Whether an architecture takes packed prefix trees (:mod:`dso.packing`) is not looked up but measured when the
model is loaded: both layouts must give the same log-probabilities, else padded rows are used. Packed rows are never
longer than a sliding window or a position table, so that what was measured holds for every row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dso.decisions import Decision, DecisionError
from dso.embedded import EMBEDDED, ModelNotFound, embedded_folder
from dso.errors import UserError
from dso.scoring import Encoded, Scores, passes, score

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A packed row's mask replaces the one that the model would have cut off at these distances.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "local_attention")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LOADER_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError)


class Backbone:
    """A frozen causal language model with its tokenizer.

    Args:
        model: a transformers causal LM; its parameters are frozen and it is put into eval mode.
        tokenizer: its tokenizer.
        name: what checkpoints and tables call it.
        revision: the Hub revision it was loaded at, if any.
        max_tokens: tokens of one packed row, or of one padded batch.
        packing: whether to pack; None asks the model by comparing both layouts.
    """

    def __init__(
        self,
        model,
        tokenizer,
        name: str = "model",
        revision: str | None = None,
        max_tokens: int = 512,
        packing: bool | None = None,
    ):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.max_tokens = max_tokens
        self._encoded: dict[str, Encoded] = {}
        config = model.config.get_text_config()
        self._context = _positive(config, "max_position_embeddings")
        limits = [_positive(config, name) for name in (*WINDOWS, "max_position_embeddings")]
        self._row_limit = min((limit for limit in limits if limit), default=None)
        self.packing = packing if packing is not None else self._packing_is_exact()

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
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        source = _source(name, revision)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
            model, info = AutoModelForCausalLM.from_pretrained(
                source, revision=revision, dtype=DTYPES[dtype], trust_remote_code=False, output_loading_info=True
            )
        except LOADER_ERRORS as error:
            raise ModelNotFound(f"model {name!r} could not be loaded: {_first_line(error)}") from error
        if missing := sorted(info["missing_keys"]):
            raise ModelNotFound(f"model {name!r} lacks {len(missing)} of its weights, {missing[0]!r} among them")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, name, revision, **options)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def encode(self, decision: Decision) -> Encoded:
        """Token ids of the decision; the candidates are tokenised in their place behind the prompt.

        Raises:
            DecisionError: if two candidates have the same tokens, chat messages meet a tokenizer without a chat
                template, the decision is longer than the model's context, or has images.
        """
        key = json.dumps([decision.prompt, [c.text for c in decision.candidates]])
        if decision.images:
            raise DecisionError(f"decision {decision.id!r} has images, but {self.name!r} is loaded as a text model")
        if key not in self._encoded:
            text, special = self._rendered(decision)
            prompt = self._tokens(text, special)
            candidates = tuple(self._continuation(text, special, prompt, c.text) for c in decision.candidates)
            if fault := self._fault(prompt, candidates):
                raise DecisionError(f"decision {decision.id!r}: {fault}")
            self._encoded[key] = Encoded(prompt, candidates)
        return self._encoded[key]

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
        """The prompt as the model will see it, chat template applied."""
        return self._rendered(decision)[0]

    def _rendered(self, decision: Decision) -> tuple[str, bool]:
        try:
            return self._render(decision.prompt)
        except UserError as error:
            raise DecisionError(f"decision {decision.id!r}: {error}") from error

    def _render(self, prompt: str | Sequence[dict[str, str]]) -> tuple[str, bool]:
        """The prompt's text, and whether the tokenizer has to add its special tokens."""
        if isinstance(prompt, str):
            return prompt, True
        if not getattr(self.tokenizer, "chat_template", None):
            raise UserError(f"the prompt is a chat, but the tokenizer of {self.name!r} has no chat template")
        from jinja2 import TemplateError

        prefilled = prompt[-1]["role"] == "assistant"
        try:
            text = self.tokenizer.apply_chat_template(
                list(prompt), tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
            )
        except (TemplateError, ValueError) as error:
            raise UserError(f"the chat template of {self.name!r} refuses the prompt: {_first_line(error)}") from error
        return text, False  # the template writes the special tokens itself

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
        return tuple(self.tokenizer(candidate, add_special_tokens=False).input_ids)

    def score(self, decisions: Sequence[Decision], *, next_token: bool = False, hidden: bool = False) -> Scores:
        """Score N decisions with the model as it is now, steered or not (see :func:`dso.scoring.score`)."""
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
        """How encoded decisions are divided into forward passes (see :func:`dso.scoring.passes`)."""
        return passes(encoded, self.packing, self.max_tokens, self._row_limit)

    def next_token(self, texts: Sequence[str]) -> Tensor:
        """(N, V) float32 log-probabilities of the token after each text."""
        candidates = ((0,),)  # one is needed, its score is not
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
    def generate(self, prompt: str | Sequence[dict[str, str]], *, max_new_tokens: int = 64, **options: Any) -> str:
        """Continue a text or answer a chat, with the model as it is now; options go to transformers' generate."""
        ids = torch.tensor([self._tokens(*self._render(prompt))], device=self.device)
        if not ids.numel():
            raise UserError("the prompt is empty")
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
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


def _source(name: str, revision: str | None) -> str:
    """What the loaders are given: a folder, or the id of a model that the Hub or its local cache has."""
    if name in EMBEDDED:
        return str(embedded_folder(name))
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder)
    if folder.is_dir():
        raise ModelNotFound(f"model {name!r}: no config.json in that folder")
    if not HUB_ID.fullmatch(name):
        known = ", ".join(EMBEDDED)
        raise ModelNotFound(f"model {name!r}: no such folder, not embedded ({known}), and no Hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:  # asked once and early: the loaders go on asking for a minute where there is no network
        snapshot_download(name, revision=revision, allow_patterns=["config.json"])
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"model {name!r}: no such folder, and not to be had from the Hub: {_first_line(error)}"
        ) from error
    return name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
