"""The README of a merged folder."""

from __future__ import annotations

from dso.exports.probe import PROBE_FILE
from dso.exports.report import MergeReport

NOTES_FILE = "README.md"
BASE_CARD = "README.base.md"

TEXT = """\
---
library_name: transformers
tags: [dso, steering, fairness]
---

# {base}, with a steering merged in

These weights are those of {base} with the steering {steering} at scale {scale:g}: {sites}.
Nothing of `dso` is needed to load or to run them. The scale can no longer be changed, and adapters made for the base
model were not measured on top of it. What the base model's licence and card say still holds{card}.

On short prompts, logits differ from those of the steering's hooks by {saved} ({dtype}), and by
{float32} before rounding (float32). The steering moves them by {effect}. Of {changed} changed
values, {lost:.1%} vanish in {dtype}.

## Is a server running these weights?

Some programs skip a bias that they have no slot for without a word. `{probe}` holds what this model says to a few
prompts. With `dso` installed: `dso verify FOLDER`, or `dso verify FOLDER --url URL --model NAME`. Without it,

```python
model = transformers.AutoModelFor{kind}.from_pretrained(FOLDER)
print(model(torch.tensor([{ids}])).logits[0, -1].log_softmax(-1)[{tokens}])
```

gives {log_probs}, each within {tolerance:g}.
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
    return TEXT.format(
        base=report.base,
        steering=report.steering or "that was given",
        scale=report.scale,
        sites=f"{in_full} of {report.sites} sites in full" + (f", {left}{more}" if left else ""),
        card=f" ({BASE_CARD})" if base_card else "",
        saved=report.saved,
        dtype=report.dtype,
        float32=report.float32,
        effect=report.effect,
        changed=report.changed,
        lost=report.lost,
        probe=PROBE_FILE,
        kind="ImageTextToText" if sees else "CausalLM",
        ids=list(first.ids),
        tokens=list(first.tokens),
        log_probs=[round(value, 3) for value in first.log_probs],
        tolerance=report.probe.tolerance,
    )
