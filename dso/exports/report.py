"""What merging did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dso.exports.plan import LeftOut
from dso.exports.probe import Probe, Verdict


@dataclass(frozen=True, slots=True)
class Distance:
    """How far logits lie apart, over all prompts, tokens and the vocabulary."""

    largest: float
    mean: float

    @classmethod
    def of(cls, one: Tensor, other: Tensor) -> Distance:
        """The distance of two tensors of logits."""
        apart = (one.double() - other.double()).abs()
        return cls(apart.max().item(), apart.mean().item())

    def __str__(self) -> str:
        return f"{self.largest:.2g} at most, {self.mean:.2g} on average"


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What merging did.

    Attributes:
        steering, base, scale: what was merged into what.
        dtype: of the folder.
        sites: number of sites of the steering.
        left_out: what was not merged.
        effect: of the hooks, against the base model.
        float32: merged weights before they are rounded, against hooks, both in float32.
        saved: the folder as transformers loads it, against hooks, both in its dtype.
        dtype_itself: the hooks in the folder's dtype, against themselves in float32.
        changed: number of values that should have changed.
        lost: share of them that are what they were, as the change is below the dtype's steps.
        probe: of the folder.
        bfloat16: the folder's own answers in bfloat16, held against its probe.
    """

    steering: str
    base: str
    scale: float
    dtype: str
    sites: int
    left_out: tuple[LeftOut, ...]
    effect: Distance
    float32: Distance
    saved: Distance
    dtype_itself: Distance
    changed: int
    lost: float
    probe: Probe
    bfloat16: Verdict

    def __str__(self) -> str:
        in_full = self.sites - len({entry.site for entry in self.left_out})
        lines = [
            f"merged       {in_full} of {self.sites} sites in full, scale {self.scale:g}, in {self.dtype}",
            f"effect       logits move by {self.effect}",
            f"float32      {self.float32} from the hooks",
            f"{self.dtype:<12} {self.saved} from the hooks, as the folder loads"
            + (f" (the hooks themselves: {self.dtype_itself} from float32)" if self.dtype != "float32" else ""),
            f"rounding     {self.lost:.1%} of {self.changed} changed values vanish in {self.dtype}",
            f"probe        {len(self.probe.prompts)} prompts, tolerance {self.probe.tolerance:g} nats; "
            + ", ".join(f"{name}: {self.probe.apart(name):.2g} off" for name in self.bfloat16.shares),
        ]
        if not self.bfloat16.passed:
            lines.append(
                "             run in bfloat16, rounding hides what was merged: the folder fails its own probe there"
            )
        return "\n".join(lines)
