"""What a steering states about itself: the fields of a checkpoint's ``dso_config.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from dso.errors import UserError
from dso.models.scores import Scoring

TRAINED_AT = 1.0  # the scale that a steering is trained at
FINITE = 1e30  # a whole number of JSON may be beyond any float


class SteeringError(UserError):
    """A steering that cannot be read or does not fit the model; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """What a checkpoint states.

    Attributes:
        operator, rank: kind of the operators (:mod:`dso.steering.operators`).
        sites: dotted module name -> width.
        fingerprint: site -> digest of its base weights (:mod:`dso.steering.fingerprint`); empty skips the check. Format
            1 has one digest of all sites, a string.
        base_model, revision: where the base model came from.
        groups, target: the groups that were made equiprobable, and their fair shares, equal unless given.
        scale_range: the scales that a user may set, 0 among them; evidence exists within it.
        default_scale: the scale where none is named; ``dso calibrate`` chooses one for somebody's limits.
        scale_curve: measured rows, one a scale (:mod:`dso.evaluation.report`).
        scoring: the rule by which decisions were scored, and by which whoever measures the steering scores them.

    Raises:
        SteeringError: if a field has the wrong type or cannot be used; the operator's kind and rank are checked where
            the operators are made.
    """

    operator: str = "affine"
    rank: int | None = None
    sites: dict[str, int]
    fingerprint: Mapping[str, str] | str = field(default_factory=dict)
    base_model: str = ""
    revision: str | None = None
    groups: tuple[str, ...] = ()
    target: tuple[float, ...] = ()
    scale_range: tuple[float, float] = (0.0, 1.0)
    default_scale: float = TRAINED_AT
    scale_curve: tuple[dict, ...] = field(default=())
    scoring: Scoring = field(default_factory=Scoring)

    def __post_init__(self) -> None:
        for name in ("groups", "target", "scale_range", "scale_curve"):
            if not isinstance(getattr(self, name), list | tuple):
                raise SteeringError(f"{name} must be a list, found {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.groups and not self.target:
            object.__setattr__(self, "target", (1 / len(self.groups),) * len(self.groups))
        if isinstance(self.scoring, dict):
            try:
                object.__setattr__(self, "scoring", Scoring(**self.scoring))
            except (UserError, TypeError) as error:
                raise SteeringError(f"scoring: {error}") from error
        for fault in _faults(self):
            raise SteeringError(fault)

    def target_for(self, groups: Collection[str]) -> dict[str, float] | None:
        """The fair shares that were trained towards, if a decision set of these groups has the same; else None."""
        if {*self.groups} != {*groups}:
            return None
        return dict(zip(self.groups, self.target, strict=True))

    @property
    def base_id(self) -> str:
        """16 hexadecimal digits that name the base weights at the sites; empty where no fingerprint is stated."""
        if isinstance(self.fingerprint, str) or not self.fingerprint:
            return str(self.fingerprint or "")[:16]
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]


def _faults(config: SteeringConfig) -> Iterator[str]:
    if not isinstance(config.sites, dict) or not config.sites:
        yield f"a steering needs at least one site, found {config.sites!r}"
    elif bad := [site for site, width in config.sites.items() if type(width) is not int or width < 1]:
        yield f"site {bad[0]!r} has width {config.sites[bad[0]]!r}, expected a whole number from 1"
    for name in ("operator", "base_model"):
        if not isinstance(getattr(config, name), str):
            yield f"{name} must be a string, found {getattr(config, name)!r}"
    known = config.fingerprint
    if isinstance(known, dict):
        if odd := [site for site, digest in known.items() if site not in config.sites or not isinstance(digest, str)]:
            yield f"fingerprint names {odd[0]!r}, which is no site, or holds something else than a string there"
    elif not isinstance(known, str):
        yield f"fingerprint must be a string a site, found {known!r}"
    if not isinstance(config.scoring, Scoring):
        yield f"scoring must be a rule of scoring, found {config.scoring!r}"
    if odd := [group for group in config.groups if not isinstance(group, str)]:
        yield f"groups must be strings, found {odd[0]!r}"
    if odd := [row for row in config.scale_curve if not isinstance(row, dict)]:
        yield f"scale_curve must be rows with names, found {odd[0]!r}"
    if not isinstance(config.revision, str | None):
        yield f"revision must be a string or null, found {config.revision!r}"
    for name in ("target", "scale_range"):
        if not all(isinstance(n, int | float) and abs(n) < FINITE for n in getattr(config, name)):
            yield f"{name} must be finite numbers, found {list(getattr(config, name))}"
    if config.target and len(config.target) != len(config.groups):
        yield f"{len(config.target)} shares in the target of {len(config.groups)} groups"
    if len(config.scale_range) != 2 or not config.scale_range[0] <= 0 <= config.scale_range[1]:
        yield f"scale_range is {list(config.scale_range)}, expected [low, high] with 0 between them"
    elif type(scale := config.default_scale) not in (int, float) or not abs(scale) < FINITE:
        yield f"default_scale must be a finite number, found {scale!r}"
    elif scale != TRAINED_AT and not config.scale_range[0] <= scale <= config.scale_range[1]:
        yield f"default_scale is {scale:g}, outside of the scale_range {list(config.scale_range)}"
