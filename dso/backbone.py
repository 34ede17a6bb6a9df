"""The frozen model behind every decision: loading, tokenising, scoring, generating.

Whether an architecture takes packed prefix trees (:mod:`dso.packing`) is not looked up but measured when the
model is loaded: both layouts must give the same log-probabilities, else padded rows are used.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dso.decisions import Decision, DecisionError
from dso.embedded import EMBEDDED, ModelNotFound, embedded_folder
from dso.scoring import Encoded, Scores, score

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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

    def __init__(self, model, tokenizer, name: str = "model", revision: str | None = None, max_tokens: int = 512, packing: bool | None = None):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.max_tokens = max_tokens
        self._encoded: dict[str, Encoded] = {}
        self.packing = packing if packing is not None else self._packing_is_exact()

    @classmethod
    def load(cls, name: str, *, revision: str | None = None, dtype: str = "float32", device: str | None = None, **options) -> Backbone:
        """Load the embedded ``smollm2-135m``, a local folder or a Hub id.

        Raises:
            ModelNotFound: if there is no such model; the message says what was looked for.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
        source = str(embedded_folder(name)) if name in EMBEDDED else name
        looks_local = source.startswith((".", "/", "~"))
        if looks_local and not (Path(source).expanduser() / "config.json").is_file():
            raise ModelNotFound(f"model {name!r}: no config.json in that folder")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=DTYPES[dtype])
        except (OSError, ValueError) as error:
            known = ", ".join(EMBEDDED)
            raise ModelNotFound(
                f"model {name!r} could not be loaded: neither embedded ({known}), nor a usable folder, nor reachable "
                f"as a Hub id; the loader said: {str(error).splitlines()[0]}"
            ) from error
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(model.to(device), tokenizer, name, revision, **options)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    def encode(self, decision: Decision) -> Encoded:
        """Token ids of the decision; the candidates are tokenised in their place behind the prompt.

        Raises:
            DecisionError: if two candidates have the same tokens, or chat messages meet a tokenizer without
                a chat template.
        """
        key = json.dumps([decision.prompt, [c.text for c in decision.candidates]])
        if key not in self._encoded:
            text, special = self._rendered(decision)
            prompt = tuple(self.tokenizer(text, add_special_tokens=special).input_ids)
            candidates = tuple(self._continuation(text, special, prompt, c.text) for c in decision.candidates)
            if len(set(candidates)) < len(candidates):
                raise DecisionError(f"decision {decision.id!r}: two candidates have the same tokens")
            self._encoded[key] = Encoded(prompt, candidates)
        return self._encoded[key]

    def prompt_text(self, decision: Decision) -> str:
        """The prompt as the model will see it, chat template applied."""
        return self._rendered(decision)[0]

    def _rendered(self, decision: Decision) -> tuple[str, bool]:
        try:
            return self._render(decision.prompt)
        except ValueError as error:
            raise DecisionError(f"decision {decision.id!r}: {error}") from error

    def _render(self, prompt: str | Sequence[dict[str, str]]) -> tuple[str, bool]:
        """The prompt's text, and whether the tokenizer has to add its special tokens."""
        if isinstance(prompt, str):
            return prompt, True
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"the prompt is a chat, but the tokenizer of {self.name!r} has no chat template")
        prefilled = prompt[-1]["role"] == "assistant"
        text = self.tokenizer.apply_chat_template(
            list(prompt), tokenize=False, add_generation_prompt=not prefilled, continue_final_message=prefilled
        )
        return text, False  # the template writes the special tokens itself

    def _continuation(self, text: str, special: bool, prompt: tuple[int, ...], candidate: str) -> tuple[int, ...]:
        whole = tuple(self.tokenizer(text + candidate, add_special_tokens=special).input_ids)
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
            next_token=next_token,
            hidden=hidden,
        )

    def next_token(self, texts: Sequence[str]) -> Tensor:
        """(N, V) float32 log-probabilities of the token after each text."""
        ids = [tuple(self.tokenizer(text).input_ids) for text in texts]
        encoded = [Encoded(prompt, ((0,),)) for prompt in ids]  # a candidate is needed, its score is not
        return score(self.model, encoded, packing=self.packing, max_tokens=self.max_tokens, next_token=True).next_token

    @torch.no_grad()
    def generate(self, prompt: str | Sequence[dict[str, str]], *, max_new_tokens: int = 64, **options) -> str:
        """Continue a text or answer a chat, with the model as it is now; options go to transformers' generate."""
        text, special = self._render(prompt)
        inputs = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").to(self.device)
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **{"do_sample": False, **options})
        return self.tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    @torch.no_grad()
    def _packing_is_exact(self) -> bool:
        """Whether a packed row gives the log-probabilities of padded rows, on sequences that branch twice."""
        if self.model.config._attn_implementation not in ("eager", "sdpa"):
            return False
        size = self.model.get_input_embeddings().num_embeddings
        ids = [(7 * i + 3) % size for i in range(1, 15)]
        probes = [
            Encoded(tuple(ids[:6]), ((ids[6],), (ids[7], ids[8]))),
            Encoded(tuple(ids[:4] + ids[9:12]), ((ids[12], ids[13]), (ids[6],))),
        ]
        try:
            packed, padded = (
                score(self.model, probes, packing=packing, max_tokens=64, next_token=True) for packing in (True, False)
            )
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False  # the architecture refuses a token-to-token mask
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        return bool((packed.next_token - padded.next_token).abs().max() < tolerance)
