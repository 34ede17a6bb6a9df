"""Steering operators that make a language model's decisions equiprobable across demographic groups.

The names below are loaded when first used, so ``import dso`` costs nothing::

    from dso import Backbone, Steering

    backbone = Backbone.load("smollm2-135m")
    steering = Steering.from_pretrained("path/to/steering")
    with steering.on(backbone.model, scale=0.4):
        ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dso.decisions.decision import Candidate, Decision, DecisionError, DecisionSet
    from dso.decisions.jsonl import read_jsonl
    from dso.decisions.sets import load_decisions
    from dso.evaluation.bias import BiasReport, accuracy, bias_report
    from dso.models.backbone import Backbone
    from dso.steering.handle import attached, detach_all
    from dso.steering.model import Steering

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "BiasReport",
    "Candidate",
    "Decision",
    "DecisionError",
    "DecisionSet",
    "Steering",
    "accuracy",
    "attached",
    "bias_report",
    "detach_all",
    "load_decisions",
    "read_jsonl",
]

_MODULES = {
    "dso.models.backbone": ("Backbone",),
    "dso.decisions.sets": ("load_decisions",),
    "dso.decisions.decision": ("Candidate", "Decision", "DecisionError", "DecisionSet"),
    "dso.decisions.jsonl": ("read_jsonl",),
    "dso.evaluation.bias": ("BiasReport", "accuracy", "bias_report"),
    "dso.steering.handle": ("attached", "detach_all"),
    "dso.steering.model": ("Steering",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
