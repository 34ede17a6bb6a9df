"""A study: methods against each other on the same decisions, as one record that goes to and from JSON.

``dso compare CONFIG`` makes one (:mod:`launch.study`), and its report is drawn from it and nothing else.

    Study     what was asked of which model, the base model, and the methods
    Method    what the config trains, a rival, the null (random directions), or an ablation
    Trial     one method with one seed: what was chosen on validation, and its curve on the test
    Point     a trial at one scale
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from dso.errors import UserError
from dso.evaluation.intervals import UNMEASURED, Estimate
from dso.evaluation.report import ScalePoint, estimate_from, plain
from dso.files import as_path, write_text

FORMAT = 1
Kind = Literal["ours", "rival", "null", "ablation"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial at one scale, on the test split.

    Attributes:
        result: bias, accuracy, answer mass and KL; its ``cut`` is against the base on the same people. ``result.scale``
            is the scale.
        neutral_kl: mean KL in nats of the next token after neutral texts.
        perplexity: relative change on neutral texts with its interval (0.01 is 1% more); nan where not measured.
    """

    result: ScalePoint
    neutral_kl: float = math.nan
    perplexity: Estimate = UNMEASURED

    def to_json(self) -> dict[str, Any]:
        """A JSON object without nan."""
        record = {"neutral_kl": self.neutral_kl, "perplexity": self.perplexity}
        return {"result": self.result.to_json()} | {name: plain(value) for name, value in record.items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Point:
        """The point of :meth:`to_json`."""
        neutral = record["neutral_kl"]
        return cls(
            result=ScalePoint.from_json(record["result"]),
            neutral_kl=math.nan if neutral is None else float(neutral),
            perplexity=estimate_from(record["perplexity"], "perplexity"),
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One method with one seed.

    Attributes:
        seed: of the method; the null's draws are its seeds.
        label: the candidate that was chosen on validation, such as ``layer 14``.
        chosen: the scale that was chosen on validation; None where none was inside the limits, and ``why`` says what
            the nearest one broke.
        tried: candidates x scales that validation measured.
        seconds: of wall clock for making and tuning it.
        points: by rising scale, without the base; the chosen scale is one of them.
    """

    seed: int
    label: str = ""
    chosen: float | None = None
    why: str = ""
    tried: int = 0
    seconds: float = 0.0
    points: tuple[Point, ...] = ()

    @property
    def at_chosen(self) -> Point | None:
        """The point of the chosen scale."""
        return next((point for point in self.points if point.result.scale == self.chosen), None)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "points"}
        return record | {"points": [point.to_json() for point in self.points]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Trial:
        """The trial of :meth:`to_json`."""
        return cls(**{**record, "points": tuple(map(Point.from_json, record["points"]))})


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method with its trials.

    Attributes:
        name: by which it was asked for.
        title: what tables call it.
        source: the paper.
        kind: ours, rival, null or ablation.
        trials: by seed.
        failed: why it has no trials, in one line; empty where it has.
    """

    name: str
    title: str
    source: str
    kind: Kind
    trials: tuple[Trial, ...] = ()
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "trials"}
        return record | {"trials": [trial.to_json() for trial in self.trials]}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Method:
        """The method of :meth:`to_json`."""
        if record["kind"] not in get_args(Kind):
            raise ValueError(f"kind is {record['kind']!r}, expected one of {', '.join(get_args(Kind))}")
        return cls(**{**record, "trials": tuple(map(Trial.from_json, record["trials"]))})


@dataclass(frozen=True, kw_only=True)
class Study:
    """Everything that a report shows.

    Attributes:
        about: text by name, in the order in which it is shown: command, date, model, its revision and fingerprint,
            decision set and counts, limits, versions. ``config`` is the resolved YAML.
        base: the base model on the test split.
        methods: ours first.
        samples: answers side by side, ``{"prompt", "answers"}`` each; an answer is ``{"method", "scale", "text",
            "probabilities": {group: share}}``.
        sparsity: site -> ``{"layer", "coefficients", "nonzero", "norm"}`` of our first steering.
        spillover: see :mod:`dso.evaluation.spillover`; empty where nothing was measured.
        capability: of our first steering, rows ``{"benchmark", "figure", "scale", "base", "steered", "difference"}``;
            the last three have intervals.
        audit: see :mod:`dso.evaluation.audit`, by ``base`` and ``steered``; empty where nothing was measured.
    """

    about: dict[str, str]
    base: Point
    methods: tuple[Method, ...]
    samples: tuple[dict[str, Any], ...] = ()
    sparsity: dict[str, dict[str, float]] = field(default_factory=dict)
    spillover: dict[str, Any] = field(default_factory=dict)
    capability: tuple[dict[str, Any], ...] = ()
    audit: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "format": FORMAT,
            "about": self.about,
            "base": self.base.to_json(),
            "methods": [method.to_json() for method in self.methods],
            "samples": list(self.samples),
            "sparsity": self.sparsity,
            "spillover": self.spillover,
            "capability": list(self.capability),
            "audit": self.audit,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Study:
        """The study of :meth:`to_json`.

        Raises:
            ValueError, KeyError, TypeError: if it is none.
        """
        if record["format"] != FORMAT:
            raise ValueError(f"format is {record['format']!r}, expected {FORMAT}")
        return cls(
            about=dict(record["about"]),
            base=Point.from_json(record["base"]),
            methods=tuple(map(Method.from_json, record["methods"])),
            samples=tuple(record["samples"]),
            sparsity=record["sparsity"],
            spillover=record["spillover"],
            capability=tuple(record["capability"]),
            audit=record["audit"],
        )

    def write(self, path: str | Path) -> None:
        """Write it as JSON."""
        write_text(path, json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n")


def read_study(path: str | Path) -> Study:
    """The study in a file that ``dso compare CONFIG`` wrote.

    Raises:
        UserError: if it cannot be read, or is none.
    """
    place = as_path(path)
    try:
        return Study.from_json(json.loads(place.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{place}: is not there; name the folder that dso compare wrote, or its study.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{place}: the study cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place}: is not a study that dso compare wrote: {error!r}") from error
