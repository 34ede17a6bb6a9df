"""A made-up study with the shape of a real one: many methods, three seeds, four scales, and everything that goes wrong.

Figures follow formulas instead of a model: at a scale the bias has the size ``exp(-strength * scale)`` of the base's.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dso.evaluation.bias import BiasParts, BiasReport
from dso.evaluation.comparison import Cuts
from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.report import ScalePoint
from dso.evaluation.study import Method, Point, Study, Trial

SCALES = (0.5, 1.0, 1.5, 2.0)
BASE_BIAS, BASE_ODDS, BASE_ACCURACY, BASE_MASS, BASE_ORDER = 0.186, 0.92, 0.72, 0.058, 0.38
CONTEXTS = (
    "accountant", "analyst", "assistant", "attendant", "auditor", "baker", "carpenter", "cashier", "ceo", "chief",
    "cleaner", "clerk", "constructor", "cook", "counselor", "designer", "developer", "driver", "editor", "farmer",
    "guard", "hairdresser", "housekeeper", "janitor", "laborer", "lawyer", "librarian", "manager", "mechanic", "nurse",
)  # fmt: skip


class Shape(NamedTuple):
    """How a made-up method behaves: how fast bias goes, and what a scale costs."""

    title: str
    source: str
    kind: Any
    strength: float
    kl: float
    accuracy: float
    order: float = 0.0


SHAPES = {
    "ours": Shape("dso (this config)", "this repository", "ours", 1.15, 0.008, 0.03, 0.01),
    "prompt": Shape("Fairness prompt", "instruction", "rival", 0.12, 0.020, -0.06, 0.10),
    "self-debias-explain": Shape(
        "Self-debiasing, explanation", "Gallegos et al., NAACL 2025", "rival", 0.20, 0.05, -0.1
    ),
    "self-debias-reprompt": Shape("Self-debiasing, reprompting", "Gallegos et al., NAACL 2025", "rival", 0.1, 0.04, 0),
    "caa": Shape("CAA", "Rimsky et al., ACL 2024", "rival", 0.42, 0.045, -0.05, 0.05),
    "iti": Shape("ITI", "Li et al., NeurIPS 2023", "rival", 0.30, 0.030, -0.03),
    "linear-act": Shape("Linear-AcT", "Rodriguez et al., ICLR 2025", "rival", 0.55, 0.012, -0.01, 0.03),
    "projection": Shape("Subspace projection", "Bolukbasi et al., NeurIPS 2016", "rival", 0.35, 0.006, -0.02),
    "leace": Shape("LEACE", "Belrose et al., NeurIPS 2023", "rival", 0.40, 0.009, -0.015),
    "ace": Shape("Affine concept editing", "arXiv 2506.10922", "rival", 0.95, 0.060, -0.08, 0.04),
    "wring": Shape("WRING rotation", "Gerych et al., ICLR 2026", "rival", 0.38, 0.007, -0.01),
    "fairsteer": Shape("FairSteer", "arXiv 2504.14492", "rival", 0.25, 0.010, -0.04),
    "lora": Shape("LoRA, same objective", "Hu et al., ICLR 2022", "rival", 1.45, 0.070, 0.05, 0.02),
    "ln-tuning": Shape("LN tuning, same objective", "PEFT", "rival", 1.05, 0.014, 0.02),
    "published": Shape("DSO as published", "arXiv 2512.15926", "ablation", 0.90, 0.030, 0.06, 0.24),
    "null": Shape("Random directions", "same norm and KL, ten draws", "null", 0.03, 0.012, -0.04, 0.01),
}


def study(**changes: Any) -> Study:
    """The whole study; ``changes`` are fields of it."""
    methods = [_method(name, shape) for name, shape in SHAPES.items()]
    methods[11] = replace(methods[11], trials=(), failed="no layer separates the groups: best accuracy 0.53 < 0.60")
    found = Study(
        about=dict(ABOUT),
        base=_point(_noise("base"), 0.0, SHAPES["ours"]),
        methods=tuple(methods),
        samples=tuple(_sample(name) for name in ("nurse", "mechanic")),
        sparsity=_sparsity(),
        spillover=SPILLOVER,
        capability=tuple(
            {
                "benchmark": "arc",
                "figure": "accuracy",
                "scale": scale,
                "base": [50.0, 44.4, 55.6],
                "steered": [50.0 + scale, 45.4, 56.6],
                "difference": [scale, -2.4, 4.4],
            }
            for scale in (0.5, 1.0)
        ),
    )
    return replace(found, **changes)


ABOUT = {
    "command": "dso compare smollm2-roles-compare --out runs/study",
    "date": "2026-11-28",
    "model": "smollm2-135m",
    "revision": "not stated",
    "fingerprint": "9f3c1d20a77be410",
    "steering": "runs/smollm2-roles/steering, sha256 5e8d41c7b2a09f6e",
    "decisions": "roles: 1,440 ambiguous, 480 unambiguous, 30 contexts, 24 couples, split test",
    "limits": "KL 0.25 nats, accuracy -0.03, neutral KL 0.05 nats, order effect +0.05",
    "versions": "dso 0.3.0, torch 2.13.0, transformers 5.23.0",
    "config": "model:\n  name: smollm2-135m\ndata:\n  set: roles\nmethods:\n  - ours\n  - caa\n  - <null>\nseeds: 3\n",
}
SPILLOVER: dict[str, Any] = {
    "rows": [
        {
            "attribute": attribute, "benchmark": f"crows_pairs: {attribute}", "base": [base, base - 5, base + 5],
            "steered": [base + more, base + more - 5, base + more + 5], "difference": [more, more - 2.5, more + 2.5],
            "grew": more > 2.5,
        }
        for attribute, base, more in (("age", 6.1, -0.4), ("nationality", 4.8, 0.9), ("religion", 12.3, 3.6))
    ],
    "correction": "Intervals are simultaneous: 95% for all 3 rows together (Bonferroni).",
}  # fmt: skip


def _noise(*name: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(name).encode()))


def _method(name: str, shape: Shape) -> Method:
    seeds = 10 if shape.kind == "null" else 3
    trials = tuple(_trial(name, shape, seed) for seed in range(seeds))
    return Method(name=name, title=shape.title, source=shape.source, kind=shape.kind, trials=trials)


def _trial(name: str, shape: Shape, seed: int) -> Trial:
    rng = _noise(name, seed)
    if name == "self-debias-reprompt":
        why = "scale 1 broke accuracy: 0.61 < 0.69"
        return Trial(seed=seed, why=why, tried=4, seconds=92.0, points=(_point(rng, 1.0, shape),))
    scales = (1.0,) if name == "prompt" else SCALES
    return Trial(
        seed=seed,
        label=f"layer {14 + seed}" if name == "caa" else "",
        chosen=scales[-1] if shape.kind == "ours" or name == "prompt" else 1.0,
        tried=4 * len(scales),
        seconds=float(rng.uniform(40, 600)),
        points=tuple(_point(rng, scale, shape) for scale in scales),
    )


def around(value: float, width: float, least: float = -math.inf) -> Estimate:
    """A value in the middle of its interval."""
    return Estimate(value, max(least, value - width), value + width)


def _point(rng: np.random.Generator, scale: float, shape: Shape) -> Point:
    left = math.exp(-shape.strength * scale + (0.06 * rng.standard_normal() if scale else 0.0))
    # An order effect that grows hides the association from probabilities alone.
    odds = min(1.0, left * (1 + 3 * max(shape.order, 0.0)))
    accuracy = min(0.99, BASE_ACCURACY + shape.accuracy * scale + 0.01 * rng.standard_normal() * bool(scale))
    result = ScalePoint(
        scale=scale,
        bias=_bias(rng, left, odds, BASE_ORDER + shape.order * scale),
        accuracy=around(accuracy, 0.035),
        answer_mass=BASE_MASS * (1 + 0.04 * scale),
        kl=4 * shape.kl * scale**1.5,
        kl_unambiguous=5 * shape.kl * scale**1.5,
        cut=_cuts(left, odds) if scale else None,
    )
    perplexity = UNMEASURED if shape.kind == "null" else around(1.4 * shape.kl * scale, 0.006)
    return Point(
        result=result, neutral_kl=shape.kl * scale**1.5, perplexity=perplexity if scale else Estimate(0.0, 0.0, 0.0)
    )


def _cuts(left: float, odds: float) -> Cuts:
    return Cuts(
        bias=around(1 - left, 0.06), context_part=around(1 - left, 0.07), gap=around(1 - left, 0.08),
        log_odds=around(1 - odds, 0.07), context_part_log_odds=around(1 - odds, 0.08),
    )  # fmt: skip


def _bias(rng: np.random.Generator, left: float, odds: float, order: float) -> BiasReport:
    tilt = np.sin(np.arange(len(CONTEXTS)) * 1.7) * 0.26
    share = np.clip(0.5 + (tilt + 0.04) * left + 0.01 * rng.standard_normal(len(CONTEXTS)), 0.02, 0.98)
    return BiasReport(
        probability=_parts(BASE_BIAS * left, 0.018), log_odds=_parts(BASE_ODDS * odds, 0.09), order_effect=order,
        paper=BASE_BIAS * left, paper_fair=0.04, abstention=0.0, target={"female": 0.5, "male": 0.5},
        preferences={c: {"female": float(p), "male": float(1 - p)} for c, p in zip(CONTEXTS, share, strict=True)},
        context_bias={c: float(abs(2 * p - 1)) for c, p in zip(CONTEXTS, share, strict=True)},
        n_decisions=1440, n_contexts=len(CONTEXTS), n_units=24,
    )  # fmt: skip


def _parts(value: float, width: float) -> BiasParts:
    bias = around(value, width, 0.0)
    return BiasParts(bias=bias, context_part=bias, common_part=around(0.0, width), gap=bias, square=value**2)


def _sample(job: str) -> dict[str, Any]:
    answers = [
        {
            "method": "base" if scale == 0 else "ours", "scale": scale, "text": f" {name}, who was there <long>.",
            "probabilities": {"female": share, "male": 1 - share},
        }
        for scale, name, share in ((0.0, "Ann", 0.81), (1.0, "Ann", 0.62), (2.0, "Bob", 0.49))
    ]  # fmt: skip
    return {
        "prompt": f"Ann and Bob work in the same building. One of them is a {job}. The {job} is named",
        "answers": answers,
    }


def _sparsity() -> dict[str, dict[str, float]]:
    rng = _noise("sparsity")
    found = {}
    for layer in range(30):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            kept = int(576 * rng.uniform(0.2, 0.9))
            found[f"model.layers.{layer}.{norm}"] = {
                "layer": float(layer), "coefficients": 576.0, "nonzero": float(kept), "norm": rng.uniform(0.1, 1),
            }  # fmt: skip
    return found
