"""What a study compares: what the config trains, DSO as published, ablations, the baselines, and the null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dso.baselines.baseline import Baseline
from dso.baselines.registry import BASELINES
from dso.errors import UserError
from dso.evaluation.study import Kind
from launch.config.reading import nearest

PAPER = "Monteiro Paes et al., DSO, CVPR 2026, arXiv 2512.15926"
# Sampled answers, +1 or -1 by the group that a context prefers in the batch, plain Adam on slopes and offsets, no
# unambiguous share, a fixed price of KL, and nothing that validation holds it to.
AFFINE = ("steering.operator=affine", "train.optimizer.learning_rate=5e-4")
FIXED_PRICE = ("constraints.kl_budget=null", "constraints.beta=0.1")
UNANCHORED = ("constraints.anchors=null",)
NO_LIMITS = (
    "constraints.neutral_kl=null", "constraints.unambiguous_kl=null", "constraints.order_increase=null",
    "constraints.min_answer_mass=null",
)  # fmt: skip
SIGNS = ("train.reward=sign",)
FROM_BATCH = ("train.preference.estimate=context", "train.preference.batch_weight=1.0")
CONTROLLED = ("train.preference.estimate=controlled", "train.preference.common_weight=1.0")
SAMPLED = ("train.estimator=reinforce", "train.preference.hard=true", "train.baseline=none")
ALONE = ("train.unambiguous=0",)
PLAIN_ADAM = ("train.optimizer.fisher_batches=0",)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of a study. It has overrides if it is a run of ``dso train``, a baseline, or neither: that is the null.

    Attributes:
        name: by which it is asked for.
        title, source, kind: see :class:`dso.evaluation.study.Method`.
        overrides: of the study's config.
        baseline: what proposes candidates.
    """

    name: str
    title: str
    source: str
    kind: Kind
    overrides: tuple[str, ...] | None = None
    baseline: Baseline | None = None


def _ablation(name: str, title: str, *overrides: str) -> Arm:
    source = f"{PAPER}, with one change"
    # What an ablation itself says of anchors counts, as it comes later.
    return Arm(name=name, title=title, source=source, kind="ablation", overrides=(*UNANCHORED, *overrides, *NO_LIMITS))


OURS = Arm(name="ours", title="dso", source="this package", kind="ours", overrides=())
PUBLISHED = Arm(
    name="published",
    title="DSO as published",
    source=PAPER,
    kind="rival",
    overrides=(*SAMPLED, *SIGNS, *FROM_BATCH, *ALONE, *PLAIN_ADAM, *AFFINE, *FIXED_PRICE, *UNANCHORED, *NO_LIMITS),
)
NULL = Arm(
    name="random",
    title="random directions",
    source="the null: directions of the same norm, at the KL of dso",
    kind="null",
)
ABLATIONS = (
    _ablation(
        "published-expected",
        "published + exact expectation",
        "train.estimator=expected", *SIGNS, *FROM_BATCH, *ALONE, *PLAIN_ADAM, *AFFINE, *FIXED_PRICE,
    ),
    _ablation(
        "published-regression",
        "published + regression of log-odds",
        "train.estimator=regression", *ALONE, *PLAIN_ADAM, *AFFINE, *FIXED_PRICE,
    ),
    _ablation(
        "published-slopes",
        "published + slopes only",
        *SAMPLED, *SIGNS, *FROM_BATCH, *ALONE, *PLAIN_ADAM, *FIXED_PRICE,
    ),
    _ablation(
        "published-preference",
        "published + controlled preference",
        *SAMPLED, *SIGNS, *CONTROLLED, *ALONE, *PLAIN_ADAM, *AFFINE, *FIXED_PRICE,
    ),
    _ablation(
        "published-unambiguous",
        "published + unambiguous decisions",
        *SAMPLED, *SIGNS, *FROM_BATCH, *PLAIN_ADAM, *AFFINE, *FIXED_PRICE,
    ),
    _ablation(
        "published-fisher",
        "published + steps in KL",
        *SAMPLED, *SIGNS, *FROM_BATCH, *ALONE, *AFFINE, *FIXED_PRICE,
    ),
    _ablation(
        "published-anchors",
        "published + anchor texts",
        *SAMPLED, *SIGNS, *FROM_BATCH, *ALONE, *PLAIN_ADAM, *AFFINE, *FIXED_PRICE, "constraints.anchors=shipped",
    ),
    Arm(
        name="published-limits",
        title="published + budget and limits",
        source=f"{PAPER}, with one change",
        kind="ablation",
        overrides=(*SAMPLED, *SIGNS, *FROM_BATCH, *ALONE, *PLAIN_ADAM, *AFFINE, *UNANCHORED),
    ),
)  # fmt: skip


def all_arms() -> dict[str, Arm]:
    """Every arm by its name, in the order in which they are run."""
    baselines = (Arm(name=b.name, title=b.title, source=b.source, kind="rival", baseline=b) for b in BASELINES)
    return {arm.name: arm for arm in (OURS, PUBLISHED, *baselines, NULL, *ABLATIONS)}


def chosen_arms(names: Sequence[str]) -> list[Arm]:
    """The arms that were asked for; ``all`` is all of them, ``rivals`` all but the ablations.

    Raises:
        UserError: naming one that there is none of, with the nearest.
    """
    known = all_arms()
    groups = {
        "all": tuple(known),
        "rivals": tuple(name for name, arm in known.items() if arm.kind != "ablation"),
        "ablations": tuple(arm.name for arm in ABLATIONS),
    }
    wanted: dict[str, None] = {}
    for name in names:
        if name not in known and name not in groups:
            guess = nearest(name, (*known, *groups))
            hint = f"did you mean {guess}?" if guess else f"known are {', '.join((*groups, *known))}"
            raise UserError(f"no method is named {name!r}; {hint}")
        wanted |= dict.fromkeys(groups.get(name, (name,)))
    return [known[name] for name in known if name in wanted]
