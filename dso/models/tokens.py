"""Text as tokens, so that what is scored is prompt + candidate, letter for letter.

A candidate is tokenised in its place behind the prompt. Where the tokenizer joins letters of both ("named " + "Mary" is
"named" + " Mary" to it), the prompt ends where all candidates still have the same tokens, and every candidate begins
there. Where it drops a blank between them, the decision is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dso.errors import UserError

Tokens = tuple[int, ...]


def tokenise(tokenizer: Any, text: str, special: bool) -> Tokens:
    """Token ids of a text that goes on, which the tokenizer begins, and does not end, with its special tokens.

    Args:
        special: whether special tokens have to be added; one that the text begins with itself is not doubled.
    """
    return _open(tokenizer, text, special, tokenizer(text, add_special_tokens=special).input_ids)


def _open(tokenizer: Any, text: str, special: bool, found: Sequence[int]) -> Tokens:
    ids, begin, end = tuple(found), tokenizer.bos_token_id, tokenizer.eos_token_id
    if not special:
        return ids
    if begin is not None and ids[:2] == (begin, begin) and text.startswith(tokenizer.bos_token):
        ids = ids[1:]
    closed = len(ids) > 1 and ids[-1] == end and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if closed else ids


def tokenise_answers(
    tokenizer: Any, text: str, special: bool, candidates: Sequence[str]
) -> tuple[Tokens, tuple[Tokens, ...], int]:
    """Token ids of a prompt and of each candidate behind it, and how many of the prompt's own tokens went to them.

    Raises:
        UserError: if the tokenizer drops a blank between prompt and candidate or behind it, or leaves nothing of the
            prompt.
    """
    bare: dict[str, list[str]] = {}  # the same texts without the blanks that a tokenizer may drop
    for candidate in candidates:
        for other in (text.rstrip() + candidate, text + candidate.lstrip(), text + candidate.rstrip()):
            if other != text + candidate:
                bare.setdefault(candidate, []).append(other)
    texts = [
        text,
        *[text + candidate for candidate in candidates],
        *[other for others in bare.values() for other in others],
    ]
    listed = tokenizer(texts, add_special_tokens=special).input_ids
    ids = {words: _open(tokenizer, words, special, found) for words, found in zip(texts, listed, strict=True)}
    for candidate, others in bare.items():
        if lost := next((other for other in others if ids[other] == ids[text + candidate]), None):
            raise UserError(
                f"the tokenizer reads {_end(text, candidate)!r} as {lost[-24:]!r}; write the prompt and its candidates "
                "without the blank that it drops"
            )
    prompt, whole = ids[text], [ids[text + candidate] for candidate in candidates]
    shared = min(common_prefix(prompt, other) for other in whole)
    if prompt and not shared:
        raise UserError(
            f"the tokenizer joins the prompt {text[-24:]!r} with its candidates to one word; begin the prompt earlier"
        )
    return prompt[:shared], tuple(other[shared:] for other in whole), len(prompt) - shared


def tokenise_behind(tokenizer: Any, last: int, candidate: str) -> Tokens:
    """Token ids of a candidate behind a token that only a processor writes."""
    before = tokenizer.decode([last])
    start, whole = (tokenise(tokenizer, text, False) for text in (before, before + candidate))
    shared = common_prefix(start, whole)
    return whole[shared:] if shared == len(start) else tokenise(tokenizer, candidate, False)


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common from their start."""
    for length, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return length
    return min(len(first), len(second))


def _end(text: str, candidate: str) -> str:
    return (text + candidate)[-24:]
