"""The questions of the ``roles`` set (``data/questions.jsonl``), for free-form answers that a prompt begins.

Each text shows two answered examples and begins the third answer up to where it names somebody, so the model knows the
form of an answer but not whom to name. The people of the examples have surnames only, which say nothing about their
gender; one example's answer is the first of them, the other's the second. Slots are those of
:mod:`dso.decisions.sets.templates`. What is asked for comes last, so that the prompts of the same people share
everything before it. ``end`` separates the examples.

Texts were chosen by what the unsteered SmolLM2-135M would say about training names: the two names hold a third or more
of the probability of the next word, and women are named 0.1 to 0.25 more often for occupations that people associate
with women. Asked for a *name*, the model lets occupations decide; asked "who", it hardly does, and there is nothing to
cut.
"""

from __future__ import annotations

from dataclasses import replace

from dso.decisions.sets.shipped import read_records
from dso.decisions.sets.templates import Template, fill

# people, their jobs, and who is asked for
_EXAMPLES = ((("Smith", "Jones"), ("cook", "baker"), 1), (("Brown", "Lee"), ("singer", "judge"), 0))


def _with_examples(asked: Template, end: str) -> Template:
    """The template after two examples of itself."""
    shots = ""
    for people, jobs, named in _EXAMPLES:
        shots += f"{fill(asked, people, jobs[named], list(zip(people, jobs, strict=True)))} {people[named]}.{end}"
    return replace(asked, text=f"{shots}{asked.text}")


def _read() -> list[Template]:
    records = [(record.pop("end", "\n"), Template(**record)) for record in read_records("questions.jsonl")]
    return [_with_examples(asked, end) for end, asked in records]


_ALL = _read()
QUESTIONS = tuple(template for template in _ALL if not template.fact)
FACTS = tuple(template for template in _ALL if template.fact)
