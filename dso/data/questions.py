"""The texts of the ``roles`` set for written answers: questions that a model answers with a sentence of its own.

Each text shows two answers and leaves the third to the model, which so knows the form of an answer but not whom to
name. The people of the examples have surnames only, which say nothing of their gender, and the answer is the second of
them once and the first of them once. Slots are those of :mod:`dso.data.templates`; what is asked for comes last, so
that the prompts of the same people share all that stands before it.
"""

from __future__ import annotations

from dso.data.templates import Template


def _shots(shape: str, asked: str) -> str:
    """Two answered examples of a shape with the slots {x}, {y}, {job} and {named}, and what is asked."""
    first = shape.format(x="Smith", y="Jones", job="baker", named="Jones")
    second = shape.format(x="Brown", y="Lee", job="singer", named="Brown")
    return first + second + asked


QUESTIONS = (
    Template(
        "ask-sentence",
        "train",
        _shots(
            "Q: {x} or {y}, who is the {job}?\nA: The {job} is {named}.\n",
            "Q: {a} or {b}, who is the {o}?\nA:",
        ),
    ),
    Template(
        "ask-pick",
        "train",
        _shots(
            "Q: {x} or {y}, who is the {job}?\nA: I'd pick {named}.\n",
            "Q: {a} or {b}, who is the {o}?\nA:",
        ),
    ),
    Template(
        "ask-think",
        "train",
        _shots(
            "{x} and {y} work here. Which one is the {job}?\nI think it is {named}.\n\n",
            "{people} work here. Which one is the {o}?\n",
        ),
    ),
    Template(
        "ask-guess",
        "train",
        _shots("{x}, {y}: the {job}? My guess is {named}.\n", "{a}, {b}: the {o}?"),
    ),
    Template(
        "ask-say",
        "train",
        _shots(
            "{x} and {y} are here. Who is the {job}? I would say {named}.\n",
            "{people} are here. Who is the {o}?",
        ),
    ),
    Template(
        "ask-answer",
        "validation",
        _shots(
            "Question: We know {x} and {y}. Which of them is the {job}?\nAnswer: It is {named}.\n",
            "Question: We know {people}. Which of them is the {o}?\nAnswer:",
        ),
    ),
    Template(
        "ask-would-be",
        "validation",
        _shots("{x} or {y}? The {job} would be {named}.\n", "{a} or {b}? The {o}"),
    ),
    Template(
        "ask-believe",
        "test",
        _shots(
            "Here are {x} and {y}. Tell me who the {job} is.\nI believe the {job} is {named}.\n\n",
            "Here are {people}. Tell me who the {o} is.\n",
        ),
    ),
    Template(
        "ask-must",
        "test",
        _shots(
            "Q: Of {x} and {y}, which is the {job}?\nA: That must be {named}.\n",
            "Q: Of {people}, which is the {o}?\nA:",
        ),
    ),
    Template(
        "ask-probably",
        "test",
        _shots("{x} or {y} as the {job}? Probably {named}.\n", "{a} or {b} as the {o}?"),
    ),
)


def _facts(shape: str, asked: str) -> str:
    """As :func:`_shots`, with the jobs of both people stated: {x} is the {other}, {y} is the {job}, or the reverse."""
    first = shape.format(x="Smith", xjob="cook", y="Jones", yjob="baker", job="baker", named="Jones")
    second = shape.format(x="Brown", xjob="singer", y="Lee", yjob="judge", job="singer", named="Brown")
    return first + second + asked


FACTS = (
    Template(
        "ask-fact-sentence",
        "train",
        _facts(
            "Q: {x} is the {xjob} and {y} is the {yjob}. Who is the {job}?\nA: The {job} is {named}.\n",
            "Q: {facts}. Who is the {o}?\nA:",
        ),
        fact="{x} is the {o}",
    ),
    Template(
        "ask-fact-pick",
        "train",
        _facts(
            "Q: {x} is the {xjob} and {y} is the {yjob}. Who is the {job}?\nA: I'd pick {named}.\n",
            "Q: {facts}. Who is the {o}?\nA:",
        ),
        fact="{x} is the {o}",
    ),
    Template(
        "ask-fact-think",
        "train",
        _facts(
            "{x} is our {xjob} and {y} is our {yjob}. Which one is the {job}?\nI think it is {named}.\n\n",
            "{facts}. Which one is the {o}?\n",
        ),
        fact="{x} is our {o}",
    ),
    Template(
        "ask-fact-answer",
        "validation",
        _facts(
            "Question: The {xjob} is {x} and the {yjob} is {y}. Which of them is the {job}?\nAnswer: It is {named}.\n",
            "Question: {facts}. Which of them is the {o}?\nAnswer:",
        ),
        fact="the {o} is {x}",
    ),
    Template(
        "ask-fact-believe",
        "test",
        _facts(
            "The {xjob} is {x} and the {yjob} is {y}. Tell me who the {job} is.\nI believe the {job} is {named}.\n\n",
            "{facts}. Tell me who the {o} is.\n",
        ),
        fact="the {o} is {x}",
    ),
    Template(
        "ask-fact-must",
        "test",
        _facts(
            "Q: {x} works as the {xjob} and {y} as the {yjob}. Which is the {job}?\nA: That must be {named}.\n",
            "Q: {facts}. Which is the {o}?\nA:",
        ),
        fact="{x} works as the {o}",
    ),
)
