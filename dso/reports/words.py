"""What a study found, in sentences: how much fairer, at what cost, how sure, what else moved, and who is ahead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dso.evaluation.comparison import cut_text
from dso.evaluation.intervals import Estimate
from dso.evaluation.report import MISSING, decimal_text
from dso.evaluation.study import Study
from dso.reports.digest import BIASES, COSTS, FIGURES, Digest, apart, digests, figures_of, ours_of

TWO_PLACES = ("order", "mass")


def figure_text(name: str, estimate: Estimate) -> str:
    """A figure of :data:`dso.reports.digest.FIGURES` with its interval where it has one; a dash for nan."""
    if math.isnan(estimate.value):
        return MISSING
    if name in ("cut", "log_odds_cut"):
        return cut_text(estimate)
    places = 2 if name in TWO_PLACES else 3
    if FIGURES[name].percent:
        texts = [MISSING if math.isnan(value) else f"{100 * value:+.1f}" for value in estimate]
        unit = "%"
    else:
        texts, unit = [decimal_text(value, places) for value in estimate], ""
    # Seeds that agree to the last digit shown have no range to show.
    bare = len({*texts}) == 1 or (math.isnan(estimate.low) and math.isnan(estimate.high))
    return f"{texts[0]}{unit}" + ("" if bare else f" [{texts[1]}, {texts[2]}]")


def summary(study: Study) -> list[str]:
    """The summary, a paragraph an item."""
    found = digests(study)
    ours = ours_of(found)
    if ours is None:
        return ["The study trains no steering of its own: the table compares the methods with the base model."]
    if not ours.figures:
        return [f"{ours.method.title}: {ours.trouble}. There is no figure of it to compare with.", *_null(found)]
    return [
        _fairer(study, ours),
        " ".join([_sure(study, ours), *_null(found)]),
        _cost(study, ours),
        _moved(study, ours),
    ]


def _fairer(study: Study, ours: Digest) -> str:
    base = figures_of(study.base, study.base)
    text = {name: figure_text(name, estimate) for name, estimate in ours.figures.items()}
    found = (
        f"{ours.method.title} {_at(ours)} takes the bias from {figure_text('bias', base['bias'])} to {text['bias']}: "
        f"a cut of {text['cut']}."
    )
    if text["log_odds_cut"] == MISSING:
        return found + " In log-odds it was not measured."
    return found + (
        " In log-odds, which answers that are merely undecided do not lower, it goes from "
        f"{figure_text('log_odds', base['log_odds'])} to {text['log_odds']}: a cut of {text['log_odds_cut']}."
    )


def _at(digest: Digest) -> str:
    scales = ", ".join(f"{scale:g}" for scale in digest.scales)
    many = "scale" if len(digest.scales) == 1 else "scales"
    return f"at {many} {scales}, chosen on validation,"


def _sure(study: Study, ours: Digest) -> str:
    bias = study.base.result.bias
    cuts = [trial.at_chosen.result.cut for trial in ours.chosen if trial.at_chosen is not None]
    sure = sum(cut is not None and cut.bias.low > 0 for cut in cuts)
    several = len(ours.method.trials) > 1
    seeds = f"in {sure} of {len(ours.method.trials)} seeds" if several else ("here" if sure else "not here")
    over = " Over seeds they reach from the lowest end of any seed to the highest." if several else ""
    return (
        f"Brackets are 95% intervals about other people like the {bias.n_units} that were asked about, in "
        f"{bias.n_decisions} decisions over {bias.n_contexts} contexts.{over} The interval of the cut lies above 0 "
        f"{seeds}."
    )


def _null(found: Sequence[Digest]) -> list[str]:
    """What steerings without a meaning cut."""
    nulls = [digest for digest in found if digest.method.kind == "null" and digest.figures]
    return [
        f"{digest.method.title}, drawn {len(digest.method.trials)} times, cut "
        f"{figure_text('cut', digest.figures['cut'])}: what a steering without a meaning would score."
        for digest in nulls
    ]


def _cost(study: Study, ours: Digest) -> str:
    base = figures_of(study.base, study.base)
    text = {name: figure_text(name, estimate) for name, estimate in ours.figures.items()}
    parts = []
    if text["accuracy"] != MISSING:
        parts.append(
            f"accuracy on unambiguous decisions {figure_text('accuracy', base['accuracy'])} → {text['accuracy']}"
        )
    if text["mass"] != MISSING:
        parts.append(f"answer mass {text['mass']} times the base's")
    if text["neutral_kl"] != MISSING:
        parts.append(f"on neutral texts {text['neutral_kl']} nats of KL")
    if text["perplexity"] != MISSING:
        parts.append(f"a perplexity of {text['perplexity']} against the base's")
    if text["kl"] != MISSING:
        parts.append(f"on the decisions themselves {text['kl']} nats of KL, part of which is the correction")
    return f"What it costs: {'; '.join(parts)}." if parts else "What it costs was not measured."


def _moved(study: Study, ours: Digest) -> str:
    before, after = study.base.result.bias.order_effect, ours.figures["order"].value
    order = (
        f"What else moved: the order effect went from {decimal_text(before, 2)} to {decimal_text(after, 2)}"
        if not math.isnan(after)
        else "What else moved: the order effect was not measured"
    )
    rows = study.spillover.get("rows", [])
    if not rows:
        return f"{order}; the bias about other attributes was not measured."
    grown = [f"{row['attribute']} ({row['benchmark']})" for row in rows if row["grew"]]
    said = f"it grew for {', '.join(grown)}" if grown else "none is shown to have grown"
    return f"{order}; of {len(rows)} figures of bias about other attributes, {said}."


def ahead(study: Study) -> dict[str, list[str]]:
    """The rivals and ablations that are ahead of ours, by where they are, the worst news first."""
    found = digests(study)
    ours = ours_of(found)
    if ours is None or not ours.figures:
        return {}
    groups = {
        "Ahead on bias and on a cost": [d for d in found if _on(d, BIASES) and _on(d, COSTS)],
        "Ahead on bias alone": [d for d in found if _on(d, BIASES) and not _on(d, COSTS)],
        "Ahead on a cost alone": [d for d in found if _on(d, COSTS) and not _on(d, BIASES)],
    }
    return {title: [_against(digest, ours) for digest in some] for title, some in groups.items() if some}


def _on(digest: Digest, names: Sequence[str]) -> bool:
    return bool({*digest.ahead} & {*names})


def _against(digest: Digest, ours: Digest) -> str:
    parts = []
    for name in digest.ahead:
        theirs, own = digest.figures[name], ours.figures[name]
        bare = [figure_text(name, Estimate(estimate.value, math.nan, math.nan)) for estimate in (theirs, own)]
        overlap = name != "neutral_kl" and not apart(theirs, own)
        parts.append(f"{FIGURES[name].title} {bare[0]} against {bare[1]}{' (intervals overlap)' if overlap else ''}")
    return f"{digest.method.title}: {'; '.join(parts)}"


def trouble_lines(study: Study) -> list[str]:
    """A sentence for every method without a figure, and for those of which some seeds have none."""
    lines = []
    for digest in digests(study):
        trials = digest.method.trials
        if digest.trouble:
            lines.append(f"{digest.method.title}: {digest.trouble}.")
        elif len(digest.chosen) < len(trials):
            why = next((trial.why for trial in trials if trial.why), "no reason is stated")
            missing = len(trials) - len(digest.chosen)
            lines.append(
                f"{digest.method.title}: {missing} of {len(trials)} seeds had nothing inside the limits: {why}."
            )
    return lines
