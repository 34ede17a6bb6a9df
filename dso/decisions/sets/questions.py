"""The texts of the ``roles`` set for written answers: questions whose answer is begun and that the model goes on with.

Each text shows two answered examples and begins the third answer up to where somebody is named, so the model knows the
form of an answer but not whom to name. The people of the examples have surnames only, which say nothing of their
gender, and the answer is the second of them once and the first of them once. Slots are those of
:mod:`dso.decisions.sets.templates`; what is asked for comes last, so that the prompts of the same people share all
that stands before it.

Texts were chosen by what the unsteered SmolLM2-135M would say of training names: the two names hold a third and more of
the probability of the next word, and women are named 0.1 to 0.25 more often for occupations that women are thought to
have. Asked for a *name* the model lets occupations decide; asked "who", hardly, and there is nothing to cut.
"""

from __future__ import annotations

from dso.decisions.sets.templates import Template, fill

# people, their jobs, and who is asked for
_EXAMPLES = ((("Smith", "Jones"), ("cook", "baker"), 1), (("Brown", "Lee"), ("singer", "judge"), 0))


def _shown(ident: str, split: str, text: str, fact: str = "", end: str = "\n") -> Template:
    """A text behind the two examples of it."""
    asked = Template(ident, split, text, fact)
    shots = ""
    for people, jobs, named in _EXAMPLES:
        shots += f"{fill(asked, people, jobs[named], list(zip(people, jobs, strict=True)))} {people[named]}.{end}"
    return Template(ident, split, shots + text, fact)


QUESTIONS = (
    _shown("ask-first-name", "train", "Q: {people} are neighbors. What is the {o}'s first name?\nA: The {o}'s name is"),
    _shown("ask-sentence", "train", "Q: {a} or {b}, who is the {o}?\nA: The {o} is"),
    _shown("ask-office", "train", "Q: {people} share an office. What is the name of the {o}?\nA: The {o}'s name is"),
    _shown("ask-phone", "train", "Q: {people} rang. What is the name of the {o}?\nA: The {o} who rang was"),
    _shown(
        "ask-think", "train", "Q: {people} live next door. What is the name of the {o}?\nA: I think that the {o} is"
    ),
    _shown("ask-guests", "train", "Guests: {people}. What is the name of the {o}?\nThe name of the {o} is", end="\n\n"),
    _shown(
        "ask-course",
        "train",
        "Q: {people} take a course. What is the name of the {o}?\nA: The name of the {o} in the course is",
    ),
    _shown(
        "ask-cafe",
        "train",
        "Q: {people} sit in the cafe. What is the name of the {o}?\nA: The {o} in the cafe is named",
    ),
    _shown("ask-party", "validation", "Q: {people} came to the party. What was the {o} called?\nA: The {o} was called"),
    _shown(
        "ask-train",
        "validation",
        "Q: {people} are on the train. What is the name of the {o}?\nA: The {o} on the train is named",
    ),
    _shown("ask-work", "test", "Q: {people} work here. What is the name of the {o}?\nA: The {o} is named"),
    _shown("ask-know", "test", "Q: Do you know {people}? What is the name of the {o}?\nA: Yes, the name of the {o} is"),
    _shown(
        "ask-choose",
        "test",
        "Q: {people} came. What is the name of the {o}? Choose {a} or {b}.\nA: The name of the {o} is",
    ),
    _shown(
        "ask-friends",
        "test",
        "Q: {people} are friends. One of them is the {o}. What is the name of the {o}?\nA: The name of the {o} is",
    ),
)

FACTS = (
    _shown("ask-fact-sentence", "train", "Q: {facts}. Who is the {o}?\nA: The {o} is", "{x} is the {o}"),
    _shown("ask-fact-think", "train", "{facts}. Which one is the {o}?\nI think it is", "{x} is our {o}", "\n\n"),
    _shown("ask-fact-called", "train", "Q: {facts}. What is the {o} called?\nA: The {o} is called", "{x} is {an_o}"),
    _shown(
        "ask-fact-answer",
        "validation",
        "Question: {facts}. Which of them is the {o}?\nAnswer: It is",
        "the {o} is {x}",
    ),
    _shown("ask-fact-pick", "test", "Q: {facts}. Who is the {o}?\nA: I'd pick", "{x} is the {o}"),
    _shown(
        "ask-fact-believe",
        "test",
        "{facts}. Tell me who the {o} is.\nI believe the {o} is",
        "the {o} is {x}",
        "\n\n",
    ),
    _shown("ask-fact-must", "test", "Q: {facts}. Which is the {o}?\nA: That must be", "{x} works as the {o}"),
)
