"""A probe: what a folder's model says to a few prompts, kept beside it, so that anyone can see whether it is the one.

``dso_probe.json`` holds, for each prompt, its token ids, the most probable next tokens and their log-probabilities,
computed in float32 from the very weights that the folder holds; and what else a program may say that skips what was
merged: the base model, and the merged model without biases that the base does not have. An answer passes if

- no log-probability is further off than ``tolerance``, twice what computing in bfloat16 changes here; and
- it lies nearer to the merged model than to any of the others. With ``m`` the merged model's log-probabilities, ``o``
  another's and ``f`` those that were found, over all tokens of all prompts:  sum (f - o)(m - o) / sum (m - o)^2 >= 1/2.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dso.errors import UserError

BASE = "base model"
PROBE_FILE = "dso_probe.json"
FORMAT = 1
TOP = 5  # tokens a prompt: what OpenAI-style completions list at most
KEPT = 6  # prompts of a probe
HALF = 0.5  # of the way from another model to the merged one
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
        others: name -> the same of another model.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    words: tuple[str, ...]
    log_probs: tuple[float, ...]
    others: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Probe:
    """A folder's probe.

    Attributes:
        prompts: the first one tells the merged model from its base best.
        tolerance: largest difference, in nats, that is not a fault.
        made: what was merged, and the versions it was made with.
    """

    prompts: tuple[Prompt, ...]
    tolerance: float
    made: Mapping[str, Any]

    def apart(self, name: str) -> float:
        """Largest difference of another model from this one, in nats."""
        return max(
            abs(other - own)
            for prompt in self.prompts
            for other, own in zip(prompt.others[name], prompt.log_probs, strict=True)
        )

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
                others={str(name): tuple(map(float, values)) for name, values in entry["others"].items()},
            )
            for entry in record["prompts"]
        )
        lengths = {len(part) for p in prompts for part in (p.tokens, p.words, p.log_probs, *p.others.values())}
        if not prompts or 0 in lengths or len(lengths) > 1 or not all(p.ids and p.others for p in prompts):
            raise ValueError("a prompt is empty, or its lists differ in length")
        return Probe(prompts, float(record["tolerance"]), dict(record["made"]))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: no {PROBE_FILE}; dso merge writes one beside a model") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    tokenizer: Any, ids: Tensor, wanted: Tensor, rounded: Tensor, others: Mapping[str, Tensor], made: Mapping[str, Any]
) -> Probe:
    """The probe of a model: of the prompts that tell it from its base in spite of rounding.

    Args:
        tokenizer: for the tokens' texts.
        ids: (prompts, tokens).
        wanted: (prompts, vocabulary) next-token logits of the folder's weights in float32.
        rounded: the same computed in bfloat16, from which the tolerance comes.
        others: the same of other models in float32; :data:`BASE` is one of them.
        made: see :class:`Probe`.
    """
    log_probs = wanted.log_softmax(-1)
    tables = {name: values.log_softmax(-1) for name, values in others.items()}
    chosen = torch.tensor(_same_number([_plain_tokens(tokenizer, row) for row in log_probs]))
    own = log_probs.gather(-1, chosen)
    noise = (rounded.log_softmax(-1).gather(-1, chosen) - own).abs().amax(-1)
    apart = (tables[BASE].gather(-1, chosen) - own).abs().amax(-1)
    kept = (apart - NOISES * noise).topk(min(KEPT, len(ids))).indices
    prompts = [
        Prompt(
            text=tokenizer.decode(ids[row]),
            ids=tuple(ids[row].tolist()),
            tokens=tuple(chosen[row].tolist()),
            words=tuple(tokenizer.decode([token]) for token in chosen[row].tolist()),
            log_probs=_short(own[row]),
            others={name: _short(table[row, chosen[row]]) for name, table in tables.items()},
        )
        for row in kept.tolist()
    ]
    return Probe(tuple(prompts), round(max(NOISES * noise[kept].max().item(), LEAST), 5), made)


def _short(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 5) for value in values.tolist())


def _same_number(rows: list[list[int]]) -> list[list[int]]:
    return [row[: min(map(len, rows))] for row in rows]


def _plain_tokens(tokenizer: Any, log_probs: Tensor) -> list[int]:
    """The most probable tokens, of those with a text of their own: servers list tokens by their texts."""
    best = log_probs.topk(min(4 * TOP, log_probs.shape[-1])).indices.tolist()
    words = [tokenizer.decode([token]) for token in best]
    plain = [token for token, word in zip(best, words, strict=True) if words.count(word) == 1 and "\ufffd" not in word]
    return (plain or best)[:TOP]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a program gave for one prompt: token id or text -> log-probability, of the most probable ones at least."""

    by_id: Mapping[int, float]
    by_word: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program's answers compare with a probe.

    Attributes:
        largest: difference of a log-probability, in nats.
        tolerance: of the probe.
        shares: name of another model -> how much of the way from there to the merged model the answers are, by the
            formula of the module; nan for a model that says the very same.
    """

    largest: float
    tolerance: float
    shares: Mapping[str, float]

    @property
    def passed(self) -> bool:
        """Whether it is the merged model."""
        return self.largest <= self.tolerance and not any(share < HALF for share in self.shares.values())


def judge(probe: Probe, answers: Sequence[Answer]) -> Verdict:
    """Hold answers against a probe, one a prompt.

    A token that is not listed has at most the smallest log-probability that is, so it differs by what is missing from
    there at least.

    Raises:
        UserError: if an answer lists no token, or none lists one of the probe's.
    """
    worst = 0.0
    along, length = dict.fromkeys(probe.prompts[0].others, 0.0), dict.fromkeys(probe.prompts[0].others, 0.0)
    met = False
    for prompt, answer in zip(probe.prompts, answers, strict=True):
        listed = [*answer.by_id.values(), *answer.by_word.values()]
        if not listed:
            raise UserError("the answer lists no log-probabilities")
        for place, (token, word) in enumerate(zip(prompt.tokens, prompt.words, strict=True)):
            wanted = prompt.log_probs[place]
            found = answer.by_id.get(token, answer.by_word.get(word))
            if found is None:
                worst = max(worst, wanted - min(listed))
                continue
            worst, met = max(worst, abs(found - wanted)), True
            for name, values in prompt.others.items():
                along[name] += (found - values[place]) * (wanted - values[place])
                length[name] += (wanted - values[place]) ** 2
    if not met:
        raise UserError(f"no answer lists {probe.prompts[0].words[0]!r} or another of the probe's tokens by its text")
    shares = {name: along[name] / square if square else math.nan for name, square in length.items()}
    return Verdict(worst, probe.tolerance, shares)


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
