"""The page and the folder that holds it: ``report.html``, ``study.json`` and a PNG a plot; or an audit alone:
``audit.html``, ``audit.json`` and ``audit.csv``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dso.errors import UserError
from dso.evaluation.study import Study
from dso.files import as_path, write_bytes, write_text
from dso.reports.auditing import audit_blocks, audit_csv
from dso.reports.digest import Digest, digests, ours_of
from dso.reports.drawing import Plot, draw
from dso.reports.figures import plots
from dso.reports.tables import (
    COLUMNS,
    capability_rows,
    context_rows,
    curve_rows,
    layer_rows,
    method_rows,
    spillover_rows,
    trial_rows,
)
from dso.reports.words import ahead, figure_text, summary, trouble_lines

PAGE, RECORD = "report.html", "study.json"
TITLE = "Bias and its cost, method by method"
AUDIT_TITLE = "Audit fields: selection by group"


def write_report(study: Study, folder: str | Path) -> Path:
    """Write the report of a study into a folder, which is made if it is not there; other files in it stay.

    The study is written first, so that it is kept whatever happens to the page.

    Returns:
        The path of the page.

    Raises:
        UserError: if the folder cannot be written to.
        ImportError: if matplotlib or jinja2 are missing; the message names the extra that has them.
    """
    place = as_path(folder)
    try:
        study.write(place / RECORD)
        page, drawn = render(study)
        for plot in drawn:
            write_bytes(place / f"{plot.name}.png", plot.png)
        write_text(place / PAGE, page)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{place}: the report cannot be written: {reason}; name another folder with --out") from error
    return place / PAGE


def write_audit(sides: Mapping[str, Mapping[str, Any]], about: Mapping[str, str], folder: str | Path) -> Path:
    """Write an audit alone into a folder, which is made if it is not there; other files in it stay.

    Args:
        sides: :meth:`dso.evaluation.audit.Audit.to_json` by ``base`` and ``steered``.
        about: what was measured, text by name, in the order in which it is shown.
        folder: to write.

    Returns:
        The path of the page.

    Raises:
        UserError: if the folder cannot be written to.
        ImportError: if jinja2 is missing; the message names the extra that has it.
    """
    place = as_path(folder)
    record = {"about": dict(about), "audit": sides}
    try:
        write_text(place / "audit.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_text(place / "audit.csv", audit_csv(sides))
        write_text(place / "audit.html", _audit_page(sides, about))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{place}: the audit cannot be written: {reason}; name another folder with --out") from error
    return place / "audit.html"


def _audit_page(sides: Mapping[str, Mapping[str, Any]], about: Mapping[str, str]) -> str:
    audit, shown = audit_blocks(sides), list(about.items())
    values = {
        "title": AUDIT_TITLE,
        "subtitle": _subtitle(about),
        "audit": audit,
        "about": shown,
        "record": "audit.json",
    }
    return fill(values | {"sections": [("audit", "Audit fields"), ("card", "Data and method")]})


def render(study: Study) -> tuple[str, list[Plot]]:
    """The page as HTML, and its plots."""
    found = digests(study)
    ours = ours_of(found)
    drawn = [draw(name, title, text, make) for name, title, text, make in plots(study, found, ours)]
    spilled = spillover_rows(study)
    values = {
        "title": TITLE,
        "subtitle": _subtitle(study.about),
        "key": _key(ours),
        "summary": summary(study),
        "ahead": ahead(study),
        "compared": ours is not None and bool(ours.figures) and len(found) > 1,
        "trouble": trouble_lines(study),
        "columns": COLUMNS,
        "methods_rows": method_rows(study),
        "trial_rows": trial_rows(study),
        "curve_rows": curve_rows(study),
        "context_rows": context_rows(study, ours),
        "layer_rows": layer_rows(study),
        "plots": drawn,
        "samples": [
            _sample(sample, {method.name: method.title for method in study.methods}) for sample in study.samples
        ],
        "capability_rows": capability_rows(study),
        "spillover_rows": spilled,
        "grown": ", ".join(f"{row[0]} ({row[1]})" for row in spilled[1:] if row[-1]),
        "correction": study.spillover.get("correction", ""),
        "audit": audit_blocks(study.audit),
        "record": RECORD,
        "about": [(name, value) for name, value in study.about.items() if name != "config"],
        "config": study.about.get("config", ""),
    }
    return fill(values | {"sections": _sections(values)}), drawn


def fill(values: Mapping[str, Any]) -> str:
    """The page's template with its values, each escaped; a section without values is left out.

    Raises:
        ImportError: if jinja2 is missing; the message names the extra that has it.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("a report needs jinja2; install it with: pip install 'dso[train]'") from error
    environment = Environment(loader=PackageLoader("dso.reports", "."), autoescape=True, trim_blocks=True)
    return environment.get_template("page.html.jinja").render(values)


def _subtitle(about: Mapping[str, str]) -> str:
    return " · ".join(about[name] for name in ("model", "decisions", "date") if name in about)


def _key(ours: Digest | None) -> list[tuple[str, str, str]]:
    """The figures that stand above everything else: name, value, interval."""
    if ours is None or not ours.figures:
        return []
    shown = {
        "cut": "bias cut by",
        "log_odds_cut": "in log-odds cut by",
        "accuracy": "accuracy, unambiguous",
        "neutral_kl": "KL on neutral texts, nats",
        "order": "order effect",
    }
    texts = {name: figure_text(name, ours.figures[name]).partition(" [") for name in shown}
    return [(shown[name], value, f"[{rest}" if rest else "") for name, (value, _, rest) in texts.items()]


def _sections(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    there: Sequence[tuple[str, str, Any]] = (
        ("summary", "Summary", values["summary"]),
        ("pareto", "Bias and cost", values["summary"]),
        ("methods", "Methods", values["summary"]),
        ("curves", "Along the scale", any(plot.name == "curves" for plot in values["plots"])),
        ("seeds", "Every seed", values["trial_rows"]),
        ("contexts", "Contexts", values["context_rows"]),
        ("layers", "What is steered", len(values["layer_rows"]) > 1),
        ("samples", "Answers side by side", values["samples"]),
        ("capability", "Capability", values["capability_rows"]),
        ("spillover", "Other attributes", values["spillover_rows"]),
        ("audit", "Audit fields", values["audit"]),
        ("card", "Data and method", values["about"]),
    )
    return [(name, title) for name, title, found in there if found]


def _sample(sample: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    return {
        "prompt": sample["prompt"],
        "answers": [
            {
                "title": f"{titles.get(answer['method'], answer['method'])}, scale {answer['scale']:g}",
                "text": answer["text"],
                "shares": [(group, round(100 * share)) for group, share in answer.get("probabilities", {}).items()],
            }
            for answer in sample["answers"]
        ],
    }
