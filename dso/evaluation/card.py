"""The model card of a saved steering: its README.md, with front matter for the Hub."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dso.evaluation.comparison import cut_text
from dso.evaluation.report import (
    ScalePoint,
    base_point,
    by_scale,
    clean,
    contexts_table,
    decimal_text,
    interval_text,
    markdown_rows,
    markdown_table,
)

if TYPE_CHECKING:
    from dso.steering.config import SteeringConfig

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TAGS = ("dso", "steering", "activation-steering", "fairness", "bias")

USE = """\
```python
from dso import Backbone, Steering

backbone = Backbone.load({base})  # or any transformers model object with these weights
steering = Steering.from_pretrained({source})

with steering.on(backbone.model, scale={scale:g}):  # 0 is the base model, bit for bit
    ...  # generate, score, evaluate

handle = steering.attach(backbone.model, scale={scale:g})
handle.scale = {high:g}  # turn it at any time, from {low:g} to {high:g}
handle.detach()
```

Start a new key-value cache after a change of scale.
"""

SUMMARY = """\
A steering: small transforms of the activations of a frozen language model that bring its choices between demographic
groups towards a target, turned up or down at inference with one number, the scale. It was trained with Direct Steering
Optimization ([arXiv 2512.15926](https://arxiv.org/abs/2512.15926)) as implemented in `dso`. The base model's weights
are not part of it and are not changed.

At scale {scale:g}: bias {bias} (base model {base_bias}), cut by {cut}; in log-odds {log_odds} (base model
{base_log_odds}), cut by {log_odds_cut}; order effect {order} (base model {base_order}); unambiguous accuracy {accuracy}
(base model {base_accuracy}). Brackets are 95% intervals.
"""

INTENDED = """\
For whoever owns a system in which this base model chooses between people of the groups above, in decisions like those
that were measured, and who measures it again where it runs. It is one part of making such decisions fair. It is no
proof that they are, and no reason to let a model decide about people without a person who answers for it.
"""

LIMITS = (
    "The numbers hold for decisions of the kind above: ambiguous choices between the candidates of the decision set. "
    "They say nothing about bias in other tasks, in free-form text, in other languages or for other attributes.",
    "Groups that are not listed above were not measured. The labels are what the decision set says "
    "(first names, pronouns), not how people describe themselves.",
    "Bias is a mean over contexts: a single context may be worse than the mean, or worse than before.",
    "Nothing was measured at scales outside the table, with other weights (a fine-tune, another quantisation), or "
    "together with other adapters. General ability was not measured beyond the columns of the table.",
    "The choice of the target is a judgement. Equal shares are not the fair answer to every question.",
)


def model_card(
    config: SteeringConfig,
    points: Sequence[ScalePoint],
    *,
    name: str,
    data: str,
    training: Mapping[str, object],
    source: str | None = None,
    base_model: str | None = None,
    kl_budget: float | None = None,
    unambiguous_kl: float | None = None,
    figure: str | None = None,
    limits: Sequence[str] = (),
) -> str:
    """The card as Markdown.

    Args:
        config: of the steering that is saved.
        points: the measured scales, the base model (scale 0) among them.
        name: the card's title.
        data: what the points were measured on, in one sentence.
        training: what the steering was trained with, one line an entry.
        source: folder or Hub id to load it from; the name when None.
        base_model: the base model's Hub id for the front matter, where ``config.base_model`` is not one.
        kl_budget: of the training run; scales above it are named among the limits.
        unambiguous_kl: the run's limit on unambiguous decisions; None where it had none but the budget.
        figure: of :func:`dso.evaluation.figure.scale_figure`, relative to the card.
        limits: further limits, one sentence or more each.

    Raises:
        ValueError: if no point has scale 0.
    """
    ordered = by_scale(points)
    base = base_point(ordered)
    full = next((point for point in ordered if point.scale == 1), ordered[-1])
    allowed = {"kl": kl_budget, "kl_unambiguous": kl_budget if unambiguous_kl is None else unambiguous_kl}
    measured = _measured_limits(ordered, base, full, allowed)
    sections = [
        _front_matter(base_model or config.base_model),
        f"# {clean(name)}\n",
        _summary(base, full),
        _facts(config),
        "## Use\n",
        _use(config, source or name, full),
        "## Evidence\n",
        f"Measured on: {clean(data)}\n",
        markdown_table(ordered),
        *([f"![Bias, accuracy and KL against the scale]({figure})\n"] if figure else []),
        *_contexts(base, full),
        "## Groups and target\n",
        markdown_rows([("group", "fair share"), *_target(config, base)]),
        "## Training\n",
        markdown_rows([("what", "value"), *((clean(str(k)), clean(str(v))) for k, v in training.items())]),
        "## Intended use\n",
        INTENDED,
        "## Limits\n",
        "\n".join(f"- {limit}" for limit in (*LIMITS, *measured, *limits)) + "\n",
    ]
    return "\n".join(sections)


def with_section(card: str, title: str, body: str) -> str:
    """A card with a section of this title: in the place of the one that is there, else before the intended use, else
    at the end."""
    section = f"## {title}\n\n{body.strip()}\n\n"
    there = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if there:
        return (card[: there.start()] + section + card[there.end() :]).rstrip() + "\n"
    before = re.search(r"^## Intended use$", card, re.MULTILINE)
    place = before.start() if before else len(card.rstrip()) + 2
    return (card.rstrip().ljust(place, "\n")[:place] + section + card[place:]).rstrip() + "\n"


def _front_matter(base_model: str) -> str:
    # A folder's name means nothing on the Hub. A JSON string is a YAML string: "1e3" stays a name.
    lines = ["library_name: dso", *([f"base_model: {json.dumps(base_model)}"] if HUB_ID.fullmatch(base_model) else [])]
    return "\n".join(("---", *lines, "tags:", *(f"- {tag}" for tag in TAGS), "---\n"))


def _summary(base: ScalePoint, full: ScalePoint) -> str:
    return SUMMARY.format(
        scale=full.scale,
        bias=interval_text(full.bias.bias),
        base_bias=interval_text(base.bias.bias),
        cut=cut_text(full.cut.bias if full.cut else None),
        log_odds=interval_text(full.bias.log_odds.bias),
        base_log_odds=interval_text(base.bias.log_odds.bias),
        log_odds_cut=cut_text(full.cut.log_odds if full.cut else None),
        order=decimal_text(full.bias.order_effect, 2),
        base_order=decimal_text(base.bias.order_effect, 2),
        accuracy=interval_text(full.accuracy),
        base_accuracy=interval_text(base.accuracy),
    )


def _facts(config: SteeringConfig) -> str:
    widths = sorted(set(config.sites.values()))
    rows = [
        ("base model", f"`{clean(config.base_model)}`" if config.base_model else "not stated"),
        ("revision", f"`{clean(config.revision)}`" if config.revision else "not stated"),
        ("fingerprint of the steered base weights", f"`{config.base_id}`" if config.fingerprint else "not stated"),
        ("operator", config.operator if config.rank is None else f"{config.operator}, rank {config.rank}"),
        ("sites", f"{len(config.sites)} modules of width {', '.join(map(str, widths))}"),
        ("scales", f"{config.scale_range[0]:g} to {config.scale_range[1]:g}"),
    ]
    return markdown_rows([("what", "value"), *rows])


def _use(config: SteeringConfig, source: str, full: ScalePoint) -> str:
    low, high = config.scale_range
    base = json.dumps(config.base_model, ensure_ascii=False)
    if config.revision:
        base += f", revision={json.dumps(config.revision)}"
    return USE.format(
        base=base,
        source=json.dumps(source, ensure_ascii=False),
        scale=0.4 if low <= 0.4 <= high else full.scale,
        low=low,
        high=high,
    )


def _contexts(base: ScalePoint, full: ScalePoint) -> list[str]:
    if base is full or not base.bias.context_bias or not full.bias.context_bias:
        return []
    title = f"### Contexts, at scale {base.scale:g} (before) and {full.scale:g} (after)\n"
    return [title, contexts_table(base.bias, full.bias, markdown=True)]


def _target(config: SteeringConfig, base: ScalePoint) -> list[tuple[str, str]]:
    shares = dict(zip(config.groups, config.target, strict=True)) if config.target else base.bias.target
    return [(clean(group), f"{share:.3g}") for group, share in shares.items()]


def _measured_limits(
    points: Sequence[ScalePoint], base: ScalePoint, full: ScalePoint, allowed: Mapping[str, float | None]
) -> list[str]:
    found = []
    if all(math.isnan(point.accuracy.value) for point in points):
        found.append("What steering costs in accuracy was not measured: the set has no unambiguous decisions.")
    for what, field in (("KL", "kl"), ("KL on unambiguous decisions", "kl_unambiguous")):
        limit, measured = allowed[field], {point.scale: getattr(point, field) for point in points}
        over = {scale: kl for scale, kl in measured.items() if limit is not None and kl > limit}
        if over:
            found.append(f"{what} is above the training budget of {limit:g} nats: {_at_scales(over)}.")
    if lost := {p.scale: p.answer_mass / base.answer_mass for p in points if p.answer_mass < base.answer_mass}:
        found.append(
            f"The probability that the answers hold together falls, to {_at_scales(lost)} of the base model's: more of "
            "it goes to what is no answer."
        )
    if worse := {p.scale: p.accuracy.value for p in points if p.accuracy.value < base.accuracy.value}:
        found.append(f"Accuracy is below the base model's {base.accuracy.value:.3f}: {_at_scales(worse)}.")
    if full.bias.abstention > 0:
        found.append(
            f"An abstaining answer has probability {full.bias.abstention:.3f} at scale {full.scale:g}; the preferences "
            "are among the other answers."
        )
    if more := {p.scale: p.bias.order_effect for p in points if p.bias.order_effect > base.bias.order_effect}:
        found.append(
            f"Answers follow the order of the people more than the base model's do ({base.bias.order_effect:.2f}): "
            f"{_at_scales(more, 2)}. Part of the parity is over orders, not in each of them."
        )
    return found


def _at_scales(values: Mapping[float, float], places: int = 3) -> str:
    return ", ".join(f"{value:.{places}f} at scale {scale:g}" for scale, value in values.items())
