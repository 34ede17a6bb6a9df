"""A probe: what a folder's model says to a few prompts, kept beside it, so that anyone can see whether it is the one.

``dso_probe.json`` holds, for each prompt, its token ids, the most probable next tokens and their log-probabilities,
computed in float32 from the very weights that the folder holds. ``tolerance`` is what rounding may add where a program
computes in bfloat16; ``base`` is how far the model without the steering is off, so that a program that skips what was
merged (a bias that it has no slot for, an old copy of the weights) is told from one that does not.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dso.errors import UserError

PROBE_FILE = "dso_probe.json"
FORMAT = 1
TOP = 5  # tokens a prompt: what OpenAI-style completions list at most
KEPT = 4  # prompts of a probe
NOISES = 2  # the tolerance is so many times what bfloat16 changes
LEAST = 0.01  # nats; programs differ by that much in float32, too
TEXTS = (
    "The doctor finished the shift and then",
    "Everyone at the office knew that the engineer",
    "When the nurse came home in the evening,",
    "The president of the company said that",
    "My new neighbour is a teacher and",
    "After the interview, the candidate told me",
    "The person who repaired our car was",
    "In the morning the chef went to the",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a probe.

    Attributes:
        text, ids: the prompt.
        tokens: ids of the most probable next tokens, best first.
        words: the same as text.
        log_probs: natural logarithms of their probabilities.
        base: largest difference of the base model's log-probabilities from these.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    words: tuple[str, ...]
    log_probs: tuple[float, ...]
    base: float


@dataclass(frozen=True, slots=True)
class Probe:
    """A folder's probe.

    Attributes:
        prompts: the first one tells the steered model from its base best.
        tolerance: largest difference, in nats, that is not a fault.
        made: what was merged, and the versions it was made with.
    """

    prompts: tuple[Prompt, ...]
    tolerance: float
    made: Mapping[str, Any]

    @property
    def tells(self) -> bool:
        """Whether the base model would fail."""
        return max(prompt.base for prompt in self.prompts) > self.tolerance

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        record = {
            "format": FORMAT,
            "tolerance": self.tolerance,
            "made": dict(self.made),
            "prompts": [asdict(prompt) for prompt in self.prompts],
        }
        (folder / PROBE_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_probe(folder: Path) -> Probe:
    """The probe of a folder.

    Raises:
        UserError: if it has none, or one that cannot be read.
    """
    path = folder / PROBE_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise UserError(f"{path}: format {record['format']!r}, this dso reads {FORMAT}")
        prompts = tuple(
            Prompt(
                text=str(entry["text"]),
                ids=tuple(int(number) for number in entry["ids"]),
                tokens=tuple(int(number) for number in entry["tokens"]),
                words=tuple(str(word) for word in entry["words"]),
                log_probs=tuple(float(number) for number in entry["log_probs"]),
                base=float(entry["base"]),
            )
            for entry in record["prompts"]
        )
        if not all(p.ids and len(p.tokens) == len(p.words) == len(p.log_probs) > 0 for p in prompts) or not prompts:
            raise ValueError("a prompt is empty or its lists differ in length")
        return Probe(prompts, float(record["tolerance"]), dict(record["made"]))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {PROBE_FILE}; dso merge writes one beside a model") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: damaged: {reason}") from error


def probe_ids(tokenizer: Any) -> Tensor:
    """Token ids (prompts, tokens) of :data:`TEXTS`, all cut to the length of the shortest: no row is padded."""
    rows = [list(tokenizer(text).input_ids) for text in TEXTS]
    length = min(map(len, rows))
    if not length:
        raise UserError("the tokenizer gives no tokens for a plain English sentence")
    return torch.tensor([row[:length] for row in rows])


def make_probe(
    tokenizer: Any, ids: Tensor, wanted: Tensor, rounded: Tensor, base: Tensor, made: Mapping[str, Any]
) -> Probe:
    """The probe of a model: of the prompts that tell it from its base in spite of rounding.

    Args:
        tokenizer: for the tokens' texts.
        ids: (prompts, tokens).
        wanted: (prompts, vocabulary) next-token logits of the folder's weights in float32.
        rounded: the same computed in bfloat16, from which the tolerance comes.
        base: the same of the base model in float32.
        made: see :class:`Probe`.
    """
    log_probs = wanted.log_softmax(-1)
    best = log_probs.topk(TOP)
    noise = (rounded.log_softmax(-1) - log_probs).gather(-1, best.indices).abs().amax(-1)
    apart = (base.log_softmax(-1) - log_probs).gather(-1, best.indices).abs().amax(-1)
    kept = (apart - NOISES * noise).topk(min(KEPT, len(ids))).indices
    prompts = [
        Prompt(
            text=tokenizer.decode(ids[row]),
            ids=tuple(ids[row].tolist()),
            tokens=tuple(best.indices[row].tolist()),
            words=tuple(tokenizer.decode([token]) for token in best.indices[row].tolist()),
            log_probs=tuple(round(value, 5) for value in best.values[row].tolist()),
            base=round(apart[row].item(), 5),
        )
        for row in kept.tolist()
    ]
    return Probe(tuple(prompts), round(max(NOISES * noise[kept].max().item(), LEAST), 5), made)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program gave for one prompt: token id or text -> log-probability, of the most probable ones at least."""

    by_id: Mapping[int, float]
    by_word: Mapping[str, float]


def largest_difference(probe: Probe, answers: Sequence[Answer]) -> float:
    """Largest difference of a log-probability from the probe's, in nats.

    A token that is not listed has at most the smallest log-probability that is, so it differs by what is missing from
    there at least.

    Raises:
        UserError: if an answer lists no token, or none lists one of the probe's.
    """
    worst, met = 0.0, False
    for prompt, answer in zip(probe.prompts, answers, strict=True):
        listed = [*answer.by_id.values(), *answer.by_word.values()]
        if not listed:
            raise UserError("the answer lists no log-probabilities")
        for token, word, wanted in zip(prompt.tokens, prompt.words, prompt.log_probs, strict=True):
            found = answer.by_id.get(token, answer.by_word.get(word))
            met = met or found is not None
            difference = max(0.0, wanted - min(listed)) if found is None else abs(found - wanted)
            worst = max(worst, difference)
    if not met:
        raise UserError(f"no answer lists {probe.prompts[0].words[0]!r} or another of the probe's tokens by its text")
    return worst


def versions() -> dict[str, str]:
    """What a probe was made with."""
    import transformers

    from dso import __version__

    return {
        "dso": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
