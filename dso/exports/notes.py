"""The README of a merged folder."""

from __future__ import annotations

import textwrap

from dso.exports.probe import BASE, PROBE_FILE
from dso.exports.report import MergeReport

NOTES_FILE = "README.md"
BASE_CARD = "README.base.md"
WIDTH = 120

HEAD = """\
---
library_name: transformers
tags: [dso, steering, fairness]
---

# {base}, with a steering merged in
"""
WHAT = """\
These weights are those of {base} with the steering {steering} at scale {scale:g}: {sites}. Nothing of `dso` is needed
to load or to run them. The scale can no longer be changed, and adapters made for the base model were not measured on
top of it. What the base model's licence and card say still holds{card}."""
HOW = """\
On short prompts, logits differ from those of the steering's hooks by {saved} ({dtype}), and by {float32} before
rounding (float32). The steering moves them by {effect}. Of {changed} changed values, {lost:.1%} vanish in {dtype}."""
ASK = """\
Some programs skip a bias that they have no slot for without a word. `{probe}` holds what this model says to a few
prompts. With `dso` installed: `dso verify FOLDER`, or `dso verify FOLDER --url URL --model NAME`. Without it,"""
CHECK = """\
```python
model = transformers.AutoModelFor{kind}.from_pretrained(FOLDER)
print(model(torch.tensor([{ids}])).logits[0, -1].log_softmax(-1)[{tokens}])
```

gives {log_probs}, each within {tolerance:g}; the base model gives {others}.
"""


def notes(report: MergeReport, *, sees: bool, base_card: bool) -> str:
    """The text of the README.

    Args:
        report: what was merged.
        sees: whether it is a vision-language model.
        base_card: whether the base model's own card lies beside it.
    """
    first = report.probe.prompts[0]
    in_full = report.sites - len({entry.site for entry in report.left_out})
    left = "; ".join(f"without the {entry.part} at {entry.site}" for entry in report.left_out[:3])
    more = f" and {len(report.left_out) - 3} more" if len(report.left_out) > 3 else ""
    facts = {
        "base": report.base,
        "steering": report.steering or "that was given",
        "scale": report.scale,
        "sites": f"{in_full} of {report.sites} sites in full" + (f", {left}{more}" if left else ""),
        "card": f" ({BASE_CARD})" if base_card else "",
        "saved": report.saved,
        "dtype": report.dtype,
        "float32": report.float32,
        "effect": report.effect,
        "changed": report.changed,
        "lost": report.lost,
        "probe": PROBE_FILE,
        "kind": "ImageTextToText" if sees else "CausalLM",
        "ids": list(first.ids),
        "tokens": list(first.tokens),
        "log_probs": [round(value, 3) for value in first.log_probs],
        "others": [round(value, 3) for value in first.others[BASE]],
        "tolerance": report.probe.tolerance,
    }
    what, how, ask = (
        textwrap.fill(text.format(**facts), WIDTH, break_long_words=False, break_on_hyphens=False)
        for text in (WHAT, HOW, ASK)
    )
    question = "## Is a server running these weights?"
    return "\n".join([HEAD.format(**facts), what, "", how, "", question, "", ask, "", CHECK.format(**facts)])
