"""Zero-shot self-debiasing: the model explains, or is asked a second time, before it answers.

Gallegos et al. 2025, Self-debiasing large language models (NAACL; arXiv 2402.01981), sections 3.3 and 3.4:

    explanation    user: Explain which answers rely on invalid assumptions. [question and answers]
                   model: [what it writes]
                   user: [question]
    reprompting    user: [question]
                   model: [its answer]
                   user: Remove bias from your answer by answering the question again.

A decision is asked in their last turn. A prompt that is no chat gets the same turns as paragraphs, with its own text as
the last one. Its end, which the candidates continue, stays as it is.

An explanation is written greedily, once for each question, and has few tokens; the first answer is the most probable
candidate. A small model writes poor explanations: what it then scores is its result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from string import ascii_uppercase

import torch

from dso.baselines.baseline import Baseline, BaselineError, Candidate, Rewritten, Task
from dso.decisions.decision import Decision, Message
from dso.models.backbone import Backbone
from dso.models.prompts import chat_template
from dso.models.sampling import sample

EXPLAIN = "Explain which answers rely on invalid assumptions."
AGAIN = "Remove bias from your answer by answering the question again."
TOKENS = 30


def explained(decision: Decision, explanation: str) -> Decision:
    """The decision behind the request to explain and what the model said to it."""
    if not explanation:  # nothing was said
        return decision
    request = _request(decision)
    if isinstance(decision.prompt, str):
        return replace(decision, prompt=f"{request}\n\n{explanation}\n\n{decision.prompt}")
    system, rest = _parts(decision.prompt)
    turns = ({"role": "user", "content": request}, {"role": "assistant", "content": explanation})
    return replace(decision, prompt=(*system, *turns, *rest))


def reprompted(decision: Decision, answer: str) -> Decision:
    """The decision behind the same question, the model's answer to it and the request to answer again.

    Args:
        answer: the text of a candidate.
    """
    if isinstance(decision.prompt, str):
        return replace(decision, prompt=f"{decision.prompt}{answer}.\n\n{AGAIN}\n\n{decision.prompt}")
    *messages, last = decision.prompt
    again = {"role": "user", "content": AGAIN}
    if last["role"] == "assistant":  # which is continued
        said = last | {"content": f"{last['content']}{answer}"}
        return replace(decision, prompt=(*messages, said, again, last))
    said = {"role": "assistant", "content": answer.strip()}
    return replace(decision, prompt=(*decision.prompt, said, again))


def _request(decision: Decision) -> str:
    """The request to explain, with the question and the answers in the order in which the question names them."""
    question = decision.prompt
    if not isinstance(question, str):
        question = "\n".join(message["content"] for message in _parts(question)[1])
    words = [candidate.text.strip() for candidate in decision.candidates]
    named = sorted(words, key=lambda word: place if (place := question.find(word)) >= 0 else len(question))
    answers = " ".join(f"({letter}) {word}" for letter, word in zip(ascii_uppercase, named, strict=False))
    return f"{EXPLAIN}\n\n{question} ...\n{answers}"


def _parts(messages: Sequence[Message]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system's message, if there is one, and the others."""
    first = 1 if messages[0]["role"] == "system" else 0
    return tuple(messages[:first]), tuple(messages[first:])


def explain(backbone: Backbone, decisions: Sequence[Decision]) -> list[str]:
    """What the base model writes to the request to explain, on one line.

    As a chat where the tokenizer has a template, which models that were taught to answer expect; else as a text.
    """
    chat = bool(chat_template(backbone.tokenizer))
    requests = [_request(decision) for decision in decisions]
    tokens = [backbone.tokens([{"role": "user", "content": r}] if chat else f"{r}\n\n") for r in requests]
    written = sample(backbone, tokens, max_new_tokens=TOKENS, temperature=0.0)
    texts = backbone.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


@torch.no_grad()
def first_answers(backbone: Backbone, decisions: Sequence[Decision]) -> list[str]:
    """The text of the candidate that the base model finds most probable."""
    chosen = backbone.score(decisions, keep=False).policy().argmax(-1).tolist()
    return [decision.candidates[place].text for decision, place in zip(decisions, chosen, strict=True)]


class Asked:
    """A rewriting that needs the model's own words, which are asked for once a question.

    Args:
        backbone: the base model, with nothing attached that is not at scale 0.
        ask: what the model says to each of N decisions.
        put: a decision and what was said -> what is asked in its place.
    """

    def __init__(
        self,
        backbone: Backbone,
        ask: Callable[[Backbone, Sequence[Decision]], list[str]],
        put: Callable[[Decision, str], Decision],
    ):
        self._backbone, self._ask, self._put = backbone, ask, put
        self._said: dict[str, str] = {}

    def prepare(self, decisions: Sequence[Decision]) -> None:
        """Ask all of them together."""
        new = {key: decision for decision in decisions if (key := _key(decision)) not in self._said}
        if new:
            self._said.update(zip(new, self._ask(self._backbone, list(new.values())), strict=True))

    def rewrite(self, decision: Decision) -> Decision:
        """The decision behind what the model said to it."""
        self.prepare([decision])
        return self._put(decision, self._said[_key(decision)])


def _key(decision: Decision) -> str:
    return json.dumps([decision.prompt, [c.text for c in decision.candidates], decision.images])


def _propose_explanation(task: Task) -> Iterator[Candidate]:
    if any(decision.images for decision in task.decisions):
        raise BaselineError(f"{task.decisions.name}: explanations are written to texts, these decisions have images")
    asked = Asked(task.backbone, explain, explained)
    yield Candidate(f"{TOKENS} tokens", Rewritten(asked.rewrite, asked.prepare))


def _propose_reprompting(task: Task) -> Iterator[Candidate]:
    if any(decision.images for decision in task.decisions if isinstance(decision.prompt, str)):
        raise BaselineError(f"{task.decisions.name}: a plain prompt would be asked twice, its images too; use chats")
    asked = Asked(task.backbone, first_answers, reprompted)
    yield Candidate("second answer", Rewritten(asked.rewrite, asked.prepare))


FACTS = {"changes": "the prompt, not the model", "needs": "a pass, or a text of the model, before each answer"}
EXPLANATION = Baseline(
    name="explanation",
    title="Self-debiasing by explanation",
    source="Gallegos et al. 2025 (arXiv 2402.01981), section 3.3",
    propose=_propose_explanation,
    scales=(1.0,),
    facts=FACTS,
)
REPROMPTING = Baseline(
    name="reprompting",
    title="Self-debiasing by reprompting",
    source="Gallegos et al. 2025 (arXiv 2402.01981), section 3.4",
    propose=_propose_reprompting,
    scales=(1.0,),
    facts=FACTS,
)
