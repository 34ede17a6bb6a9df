"""The config of a training run: how one is found, read, checked and written.

A config is the name of a file in ``configs`` or a path to a YAML file, and then ``key=value`` overrides::

    config = load_config("smollm2-roles", ["train.max_steps=50", "constraints.kl_budget=0.05"])
    config.train.max_steps

``train.estimator`` decides what is trained, and with it which keys there are: a key that would have no effect is
refused. What a run used is written by :func:`resolved_yaml`, which reads back as an equal config.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationInfo, model_validator

from launch.config import moved
from launch.config.keys import SAME, Mistake, Section, build, describe, get, keys, put, section, subsection
from launch.config.reading import ConfigError, dump_yaml, join, nearest, parse_override, parse_yaml
from launch.config.sections import (
    FREEFORM,
    ON_ANSWERS,
    ConstraintsSection,
    DataSection,
    EvaluationSection,
    MatcherSection,
    ModelSection,
    RunSection,
    SteeringSection,
    TrainSection,
)

__all__ = ["ConfigError", "TrainConfig", "changes", "known_configs", "load_config", "resolved_yaml", "to_dict"]

FOLDER = Path(__file__).parents[2] / "configs"  # beside this package: no folder of that name elsewhere stands for it
QUESTIONS = {"texts": "questions"}  # what free-form runs ask of the set roles


class TrainConfig(Section):
    """Everything that a training run is told."""

    model: ModelSection = section(ModelSection)
    data: DataSection = section(DataSection)
    steering: SteeringSection = section(SteeringSection)
    train: TrainSection = section(TrainSection)
    matcher: MatcherSection = section(MatcherSection, ON_ANSWERS)
    constraints: ConstraintsSection = section(ConstraintsSection)
    evaluation: EvaluationSection = section(EvaluationSection)
    run: RunSection = section(RunSection, resumes=True)

    @property
    def freeform(self) -> bool:
        """Whether free-form answers are trained, not probabilities of candidates."""
        return self.train.estimator in FREEFORM

    @property
    def decisions(self) -> int:
        """Of a step, over all processes."""
        return self.train.ambiguous + self.train.unambiguous

    @model_validator(mode="before")
    @classmethod
    def _settled(cls, raw: object, info: ValidationInfo) -> object:
        """Refuse keys without an effect, and fill in the defaults of free-form runs."""
        if not isinstance(raw, Mapping):
            return raw
        values = _copied(raw)
        overridden = (info.context or {}).get("overridden", ())
        chosen = get(values, "train.estimator", "expected")
        defaults = {key.path: key.default for key in keys(cls)}
        if chosen in FREEFORM:
            fills = {key.path: key.facts.freeform for key in keys(cls) if key.facts.freeform is not SAME}
            if get(values, "data.set", defaults["data.set"]) == "roles":
                fills["data.options"] = QUESTIONS
            defaults |= fills
        else:
            fills = {}
        for key in keys(cls):
            given = get(values, key.path, SAME) is not SAME
            moot = [w for w in key.facts.when if not w.holds(get(values, w.path, defaults.get(w.path)))]
            if given and moot and get(values, key.path) is None:
                _remove(values, key.path)  # null says nothing
            elif given and moot and _are_overridden(moot[0].path, overridden) and key.path not in overridden:
                _remove(values, key.path)  # said by a file for the value that an override replaced
            elif given and moot:
                found = get(values, moot[0].path, defaults.get(moot[0].path))
                is_now = f"{moot[0].path} is {'null' if found is None else found}"
                raise Mistake(key.path, f"has no effect, as {is_now} (it needs {moot[0].wanted}); remove it")
            elif not given and not moot and key.path in fills:
                put(values, key.path, fills[key.path])
        return values


def known_configs() -> tuple[str, ...]:
    """The names of the shipped configs."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a shipped name or a YAML file, with ``key=value`` overrides applied in order.

    Raises:
        ConfigError: if there is no such config, or it or an override holds a mistake; the message names the file or
            the override, the dotted path, and what to do.
    """
    source, text = _read(str(name_or_path))
    parsed = [(item, *parse_override(item)) for item in overrides]
    try:
        raw = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected a mapping of sections ({', '.join(TrainConfig.model_fields)})")
    try:
        _refuse_moved(raw)
        for _, path, value in parsed:
            raw = _override(raw, path, value)
            _refuse_moved(raw)
        return build(TrainConfig, raw, {"overridden": [path for _, path, _ in parsed]})
    except ConfigError as error:
        blamed = next((item for item, path, _ in reversed(parsed) if _related(path, error.path)), None)
        where = source if blamed is None else f"override {blamed!r}"
        raise ConfigError(f"{where}: {error}") from error


def in_effect(config: TrainConfig) -> list[str]:
    """The dotted paths of the keys that have an effect in a run, in order."""
    values = config.model_dump()
    return [key.path for key in keys(TrainConfig) if all(when.holds(get(values, when.path)) for when in key.facts.when)]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The values that have an effect in a run, the defaults too, as nested plain values."""
    values: dict[str, Any] = _plain(config.model_dump())
    found: dict[str, Any] = {}
    for path in in_effect(config):
        put(found, path, get(values, path))
    return found


def resolved_yaml(config: TrainConfig) -> str:
    """:func:`to_dict` as YAML that :func:`load_config` reads back as an equal config."""
    return dump_yaml(to_dict(config))


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """What keeps a run that began with one config from going on with another, a text a key; empty if nothing does."""
    old, new = before.model_dump(), after.model_dump()
    in_either = {*in_effect(before), *in_effect(after)}
    return [
        f"{key.path} was {get(old, key.path)!r} and is {get(new, key.path)!r}"
        for key in keys(TrainConfig)
        if key.path in in_either and not key.facts.resumes
        if get(old, key.path) != get(new, key.path)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _copied(raw: Any) -> Any:
    """Nested mappings as dictionaries of their own; sections as what was given of them."""
    if isinstance(raw, BaseModel):
        raw = {name: getattr(raw, name) for name in raw.model_fields_set}
    return {name: _copied(value) for name, value in raw.items()} if isinstance(raw, Mapping) else raw


def _remove(values: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    below = get(values, ".".join(parents), values) if parents else values
    del below[last]


def _are_overridden(path: str, overridden: Sequence[str]) -> bool:
    return any(_related(path, other) for other in overridden)


def _refuse_moved(raw: Mapping[str, Any]) -> None:
    for path in (*moved.MOVED, *moved.GONE):
        found = get(raw, path, SAME)
        if found is not SAME and not (path == "train.preference" and isinstance(found, Mapping)):
            raise ConfigError(str(moved.refusal(path)), path)


def _override(raw: object, path: str, value: object) -> dict[str, Any]:
    """A copy of a plain mapping with the value at a dotted path replaced."""
    kind: type[BaseModel] | None = TrainConfig
    top: dict[str, Any] = dict(raw) if isinstance(raw, Mapping) else {}
    copy, parts = top, path.split(".")
    for depth, part in enumerate(parts, 1):
        field = kind.model_fields.get(part) if kind else None
        kind = subsection(field) if field else None
        if depth == len(parts):
            break
        below = copy.get(part)
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"expected a mapping, found {describe(below)}", ".".join(parts[:depth]))
        copy[part] = dict(below or {})
        copy = copy[part]
    if kind is not None and path not in moved.MOVED:
        example = join(path, next(iter(kind.model_fields)))
        raise ConfigError(f"this is a section; set its values one by one, as in {example}=...", path)
    copy[parts[-1]] = value
    return top


def _related(path: str, other: str) -> bool:
    """Whether one dotted path is the other, or holds it."""
    left, right = re.split(r"[.[]", path), re.split(r"[.[]", other)
    return all(a == b for a, b in zip(left, right, strict=False))


def _read(name_or_path: str) -> tuple[str, str]:
    """The text of a config, and what messages call it."""
    known = known_configs()
    if name_or_path in known:
        return f"config {name_or_path}", (FOLDER / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    path = Path(name_or_path)
    guess = nearest(path.name.removesuffix(".yaml"), known)
    hint = f"did you mean {guess}?" if guess else f"shipped ones are {', '.join(known)}"
    if path.suffix not in (".yaml", ".yml") and len(path.parts) < 2:
        raise ConfigError(f"no config is named {name_or_path!r}; {hint} (a path ends in .yaml)")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {hint}") from error
