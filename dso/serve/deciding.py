"""``/v1/dso/decide``: the probabilities of candidates and of their groups, at several scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dso.decisions.decision import Candidate, Decision
from dso.errors import UserError
from dso.models.backbone import Backbone
from dso.serve.asking import Limits, read_messages
from dso.serve.fields import ApiError, Fields
from dso.steering.handle import Handle

MOST_SCALES = 21
MOST_CANDIDATES = 32


def read_decision(body: dict[str, Any], limits: Limits) -> tuple[Decision, tuple[float, ...]]:
    """The decision of a body, and the scales at which it is asked for."""
    fields = Fields(body)
    prompt = fields.take("prompt")
    if isinstance(prompt, list):
        prompt = read_messages(prompt, "prompt")
    elif not isinstance(prompt, str):
        raise fields.fault("prompt", prompt, "a string or a list of chat messages")
    candidates = fields.take("candidates")
    if not isinstance(candidates, list) or not 2 <= len(candidates) <= MOST_CANDIDATES:
        raise fields.fault("candidates", candidates, f"a list of 2 to {MOST_CANDIDATES} objects with text and group")
    scales = fields.take("scales", [limits.scale])
    if not isinstance(scales, list) or not 1 <= len(scales) <= MOST_SCALES:
        raise fields.fault("scales", scales, f"a list of 1 to {MOST_SCALES} numbers")
    low, high = limits.scales
    numbers = [Fields({str(i): s}, "scales.").number(str(i), low, high, None) for i, s in enumerate(scales)]
    if None in numbers:
        raise fields.fault("scales", scales, "numbers")
    fields.take("model")
    fields.end()
    listed = tuple(_candidate(candidate, number) for number, candidate in enumerate(candidates))
    try:
        decision = Decision(id="asked", context="asked", kind="ambiguous", prompt=prompt, candidates=listed)
    except UserError as error:
        raise ApiError(str(error).removeprefix("decision 'asked': ")) from error
    return decision, tuple(numbers)


def _candidate(candidate: object, number: int) -> Candidate:
    place = f"candidates.{number}"
    if not isinstance(candidate, dict):
        raise Fields({}).fault(place, candidate, "an object with text and group")
    fields = Fields(candidate, f"{place}.")
    made = Candidate(text=fields.text("text"), group=fields.text("group"))
    fields.end()
    return made


def decide(backbone: Backbone, handle: Handle, decision: Decision, scales: Sequence[float]) -> list[dict[str, Any]]:
    """What the model says of a decision at each scale; the handle is turned.

    Returns:
        for each scale the probability of each group and candidate among the candidates, their log-probabilities in the
        whole distribution, and the mass that they hold together.

    Raises:
        ApiError: if the decision cannot be scored.
    """
    made = []
    for scale in scales:
        handle.scale = scale
        try:
            scores = backbone.score([decision], keep=False)
        except UserError as error:
            raise ApiError(str(error).removeprefix("decision 'asked': ")) from error
        shares = scores.policy()[0].exp().tolist()
        groups: dict[str, float] = {}
        for candidate, share in zip(decision.candidates, shares, strict=True):
            groups[candidate.group] = groups.get(candidate.group, 0.0) + share
        listed = [
            {"text": candidate.text, "group": candidate.group, "probability": share, "log_prob": log_prob}
            for candidate, share, log_prob in zip(
                decision.candidates, shares, scores.log_probs[0].tolist(), strict=True
            )
        ]
        mass = float(scores.answer_mass()[0])
        made.append({"scale": scale, "groups": groups, "candidates": listed, "answer_mass": mass})
    return made
