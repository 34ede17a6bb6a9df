"""The texts of the ``roles`` set: every template (``data/prompts.jsonl``), written by hand.

Slots: ``{people}`` ("Mary and John", or "Mary, Aisha, John and Jamal"), ``{bullets}`` (one name to a line), ``{n}``
("two", "four"), ``{o}`` (the occupation), ``{an_o}`` (with its article), ``{O}`` (capitalised), and for two people only
``{a}`` and ``{b}``. Unambiguous templates also have ``{facts}``: one ``fact`` about each person, joined as ``join``
says.

The texts keep three rules: nothing hints at one of the people; the very next word is the person's name; and the
occupation comes after the people and as late as possible, so that the prompts of the same people share a long prefix.
A text that is a list is a chat; a last message of the assistant is continued.

Templates were chosen and split by what the unsteered SmolLM2-135M does with training names. A text with an answer mass
below 0.006 is no decision and was left out, as were most texts in which the model is hardly biased (the mean preference
differs by less than 0.03 between occupations of the two stereotypes): they leave little to learn from and nothing to
cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dso.decisions.sets.shipped import read_records

Text = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Template:
    """One text with its slots.

    Args:
        id: the decision's :attr:`~dso.decisions.decision.Decision.template`; it begins with the style of the text.
        split: ``train``, ``validation`` or ``test``.
        text: the prompt; a tuple of (role, content) is a chat.
        fact: of an unambiguous template, what is said about each person, with the slots ``{x}``, ``{o}``, ``{an_o}``.
        join: how facts are joined: ``and`` ("A, B and C"), ``comma``, ``lines``.
    """

    id: str
    split: str
    text: Text
    fact: str = ""
    join: str = "and"

    @property
    def style(self) -> str:
        """The kind of text: plain, chat, hiring, letter, list, story, minutes, phone, news or email."""
        return self.id.split("-")[0]

    @property
    def pair(self) -> bool:
        """Whether it is made for two people; with more groups it is left out."""
        return "{b}" in self.text


def read_templates(name: str) -> list[Template]:
    """The templates of one of the shipped files, in its order."""
    templates = []
    for record in read_records(name):
        text = record["text"]
        if not isinstance(text, str):
            record["text"] = tuple((message["role"], message["content"]) for message in text)
        templates.append(Template(**record))
    return templates


_PROMPTS = read_templates("prompts.jsonl")
AMBIGUOUS = tuple(template for template in _PROMPTS if not template.fact)
UNAMBIGUOUS = tuple(template for template in _PROMPTS if template.fact)


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def spell(count: int) -> str:
    """A small number as a word."""
    return {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}.get(count, str(count))


def enumerate_words(words: Sequence[str]) -> str:
    """``A``, ``A and B``, ``A, B and C``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def fill(
    template: Template, people: Sequence[str], occupation: str, facts: Sequence[tuple[str, str]] = ()
) -> str | tuple[dict[str, str], ...]:
    """The prompt of a template for people in the order given.

    Args:
        template: the text with its slots.
        people: names.
        occupation: the one that is asked for.
        facts: for an unambiguous template, who has which occupation.
    """
    slots = {
        "people": enumerate_words(people),
        "bullets": "\n".join(f"- {name}" for name in people),
        "a": people[0],
        "b": people[1],
        "n": spell(len(people)),
        "o": occupation,
        "an_o": article(occupation),
        "O": occupation.capitalize(),
    }
    if template.fact:
        slots["facts"] = _state(template, facts)
    if isinstance(template.text, str):
        return template.text.format_map(slots)
    return tuple({"role": role, "content": text.format_map(slots)} for role, text in template.text)


def _state(template: Template, facts: Sequence[tuple[str, str]]) -> str:
    said = [template.fact.format(x=x, o=o, an_o=article(o), O=o.capitalize()) for x, o in facts]
    if template.join == "lines":
        return "\n".join(said)
    joined = ", ".join(said) if template.join == "comma" else enumerate_words(said)
    return joined[0].upper() + joined[1:]
