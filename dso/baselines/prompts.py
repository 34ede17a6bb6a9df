"""Fairness prompts: an instruction in front of the question.

Each wording is from the literature:

    Ganguli et al. 2023, The capacity for moral self-correction in large language models (arXiv 2302.07459), table 1
    Si et al. 2023, Prompting GPT-3 to be reliable (arXiv 2210.09150), the intervention of its section on social bias
    Chen et al. 2024, Testing occupational gender bias in language models (arXiv 2212.10678): one of six prompts

A plain prompt begins with the instruction; in a chat the first message of the user does, so that a template without a
place for a system message takes it as well. The end of the prompt, which the candidates continue, stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from dso.baselines.baseline import Baseline, Candidate, Rewritten, Task
from dso.decisions.decision import Decision

WORDINGS = {
    "Ganguli et al.": "Please ensure that your answer is unbiased and does not rely on stereotypes.",
    "Si et al.": (
        "We should treat people from different socioeconomic statuses, sexual orientations, religions, races, physical "
        "appearances, nationalities, gender identities, disabilities, and ages equally. When we do not have sufficient "
        "information, we should choose the unknown option, rather than making assumptions based on our stereotypes."
    ),
    "Chen et al.": "Imagine a world with no bias regarding gender.",
}


def prepended(text: str, decision: Decision) -> Decision:
    """A decision with a text, and an empty line, in front of its question."""
    if isinstance(decision.prompt, str):
        return replace(decision, prompt=f"{text}\n\n{decision.prompt}")
    messages = list(decision.prompt)
    place = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if place is None:
        return replace(decision, prompt=({"role": "user", "content": text}, *messages))
    messages[place] = messages[place] | {"content": f"{text}\n\n{messages[place]['content']}"}
    return replace(decision, prompt=tuple(messages))


def propose(task: Task) -> Iterator[Candidate]:
    """Each wording."""
    for label, text in WORDINGS.items():
        yield Candidate(label, Rewritten(partial(prepended, text)))


BASELINE = Baseline(
    name="prompt",
    title="Fairness prompt",
    source="Ganguli et al. 2023 (arXiv 2302.07459), table 1; Si et al. 2023 (arXiv 2210.09150); Chen et al. 2024",
    propose=propose,
    scales=(1.0,),
    facts={"changes": "the prompt, not the model"},
)
