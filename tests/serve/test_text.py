"""Tokens as text: what comes out piece by piece is the text of all, up to a stop."""

from __future__ import annotations

import pytest
from tiny import byte_tokenizer

from dso.serve.text import TextWriter

TOKENIZER = byte_tokenizer()


def pieces(text: bytes, *stops: str) -> tuple[list[str], TextWriter]:
    """What a writer gives for the bytes one by one, behind a prompt, and at the end."""
    tokens = [byte_token(ord("a"))] * 8
    writer = TextWriter(TOKENIZER, tokens, stops)
    made = []
    for byte in text:
        made.append(writer.add(byte_token(byte)))
        if writer.stopped:
            return made, writer
    return [*made, writer.end()], writer


def byte_token(byte: int) -> int:
    """The token of a byte; ids are in the order of the alphabet's letters that stand for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return TOKENIZER.convert_tokens_to_ids(bytes_to_unicode()[byte])


def test_a_character_of_several_tokens_comes_whole() -> None:
    made, _ = pieces("né €!".encode())
    assert made == ["n", "", "é", " ", "", "", "€", "!", ""]


def test_an_unfinished_character_comes_at_the_end() -> None:
    made, _ = pieces(b"a\xe2\x82")
    assert made == ["a", "", "", "\ufffd"]


@pytest.mark.parametrize(
    "text", [b"\x80\x80\x80\x80\xc3\xa9", b"\xff\xfeab\xf0\x9f\x98\x80\xf0\x9f", b"\xc3\xc3\xa9 \xa9"]
)
def test_broken_bytes_are_those_of_the_whole_text(text: bytes) -> None:
    assert "".join(pieces(text)[0]) == text.decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two", (".",), "one"),
        ("ab END cd", ("END",), "ab "),
        ("ab EN cd", ("END",), "ab EN cd"),
        ("aab", ("ab",), "a"),
        ("xyz", ("z", "yz"), "x"),
        ("a EN", ("END",), "a EN"),
    ],
)
def test_a_stop_ends_the_text_and_what_may_begin_one_waits(text: str, stops: tuple[str, ...], expected: str) -> None:
    made, writer = pieces(text.encode(), *stops)
    assert "".join(made) == expected
    assert writer.stopped == (expected != text)


def test_what_may_begin_a_stop_is_held_back_until_it_does_not() -> None:
    made, _ = pieces(b"aENb", "END")
    assert made == ["a", "", "", "ENb", ""]


def test_the_first_word_keeps_its_blank() -> None:
    """A tokenizer that drops the blank of a text's first word does not drop that of an answer's."""

    class Dropping:
        words = ["", "The", " nurse", " is", " Ann"]

        def decode(self, tokens, skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return "".join(self.words[token] for token in tokens).lstrip(" ")

    writer = TextWriter(Dropping(), [1, 2])
    assert [writer.add(3), writer.add(4), writer.end()] == [" is", " Ann", ""]
