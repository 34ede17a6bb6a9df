"""Keys of a config: their sections, what they need to have an effect, and how a mistake in one is told.

A section is a frozen pydantic model of strict types. What pydantic has no word for is a :class:`Facts` beside the
field: which other value the key needs, what its default is on free-form answers, whether it may change when a run goes
on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from launch.config.reading import ConfigError, join, nearest

T = TypeVar("T", bound=BaseModel)
SAME = object()  # the default of a key that has one for all trainers


class Section(BaseModel):
    """A part of a config."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Mistake(ValueError):
    """Values that contradict each other; ``path`` is the key below the section that is to blame, "" for the section."""

    def __init__(self, path: str, reason: str):
        super().__init__(reason)
        self.path, self.reason = path, reason


@dataclass(frozen=True, slots=True)
class When:
    """Another key's value without which a key has no effect.

    Attributes:
        path: of the other key.
        holds: whether a value of it is such a one.
        wanted: what it has to be, for people.
    """

    path: str
    holds: Callable[[Any], bool]
    wanted: str

    def __str__(self) -> str:
        return f"{self.path} {self.wanted}"


def one_of(path: str, *values: str) -> When:
    """Where the other key has one of these values."""
    return When(path, lambda value: value in values, " or ".join(values))


@dataclass(frozen=True, slots=True)
class Facts:
    """What is to be known of a key beside its type, default and bounds; pydantic puts it into the JSON schema.

    Attributes:
        when: what it needs to have an effect.
        freeform: its default where free-form answers are trained; :data:`SAME` as for the other trainers.
        resumes: it may change when a run goes on.
        launcher: it matters only to runs of several processes.
    """

    when: tuple[When, ...] = ()
    freeform: Any = SAME
    resumes: bool = False
    launcher: bool = False

    def __call__(self, schema: dict[str, Any]) -> None:
        if self.when:
            schema["x-needs"] = [str(when) for when in self.when]
        if self.freeform is not SAME:
            schema["x-default-freeform"] = self.freeform
        if self.resumes:
            schema["x-may-change-on-resume"] = True


def key(
    default: Any,
    says: str,
    *when: When,
    freeform: Any = SAME,
    resumes: bool = False,
    launcher: bool = False,
    **bounds: Any,
) -> Any:
    """A field: its default, what it means, its facts, and pydantic's bounds (``ge``, ``gt``, ...)."""
    return Field(default, description=says, json_schema_extra=Facts(when, freeform, resumes, launcher), **bounds)


def section(kind: type[Section], *when: When, resumes: bool = False) -> Any:
    """A field that holds a section, whose facts are those of all of its keys."""
    return Field(default_factory=kind, json_schema_extra=Facts(when, resumes=resumes))


@dataclass(frozen=True, slots=True)
class Key:
    """A value of a config: where it stands, its field, and its facts with those of the sections around it."""

    path: str
    field: FieldInfo
    facts: Facts

    @property
    def default(self) -> Any:
        """Of the trainers on decisions."""
        return self.field.get_default(call_default_factory=True)


def facts_of(field: FieldInfo) -> Facts:
    """The facts of a field."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, Facts) else Facts()


def subsection(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def keys(kind: type[BaseModel], path: str = "", around: Facts = Facts()) -> Iterator[Key]:  # noqa: B008  (frozen)
    """Every value of a section and of the sections in it, in their order."""
    for name, field in kind.model_fields.items():
        own, below, place = facts_of(field), subsection(field), join(path, name)
        facts = replace(own, when=(*around.when, *own.when), resumes=around.resumes or own.resumes)
        if below is not None:
            yield from keys(below, place, facts)
        else:
            yield Key(place, field, facts)


def get(values: Any, path: str, missing: Any = None) -> Any:
    """The value at a dotted path of nested mappings; ``missing`` where there is none."""
    for part in path.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return missing
        values = values[part]
    return values


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; what stands in the way of a section stays, for pydantic to refuse."""
    *parents, last = path.split(".")
    for part in parents:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            return
    values[last] = value


# Telling mistakes


def build(kind: type[T], raw: object, context: dict[str, Any] | None = None) -> T:
    """A model from plain values.

    Raises:
        ConfigError: for the first mistake, with its dotted path.
    """
    try:
        return kind.model_validate(raw, context=context)
    except ValidationError as error:
        raise explained(kind, raw, error) from None


def explained(kind: type[BaseModel], raw: object, error: ValidationError) -> ConfigError:
    """The first mistake that pydantic found, an unknown key before all others, said with its dotted path."""
    found = min(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    cause = found.get("ctx", {}).get("error")
    place = [part for part in found["loc"] if part != "[key]"]
    if isinstance(cause, Mistake):
        return ConfigError(cause.reason, below(dotted(place), cause.path))
    if found["type"] == "invalid_key":
        return ConfigError(f"keys must be strings, found {describe(place[-1])}", dotted(place[:-1]))
    if found["type"] == "extra_forbidden":
        return ConfigError(unknown(str(place[-1]), [str(part) for part in place[:-1]], kind), dotted(place))
    if found["loc"] and found["loc"][-1] == "[key]":
        words = f"keys must be strings, found {describe(place[-1])}; put it in quotes"
        return ConfigError(words, dotted(place[:-1]))
    return ConfigError(_reason(found), dotted(place))


def _reason(found: Any) -> str:
    """What is wrong with a value, in our words."""
    kind, value, context = found["type"], found["input"], found.get("ctx", {})
    limits = {
        "greater_than_equal": f"must be at least {_number(context.get('ge'))}",
        "greater_than": f"must be above {_number(context.get('gt'))}",
        "less_than_equal": f"must be at most {_number(context.get('le'))}",
        "less_than": f"must be below {_number(context.get('lt'))}",
    }
    if kind in limits:
        return f"{limits[kind]}, found {value}"
    if kind in ("string_too_short", "too_short"):
        return "must not be empty" if context.get("min_length") == 1 else "has too few values"
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        guess = nearest(value, choices) if isinstance(value, str) else None
        hint = f"; did you mean {guess}?" if guess else ""
        return f"expected one of {', '.join(choices)}, found {describe(value)}{hint}"
    names = {
        "bool_type": "true or false", "int_type": "an integer", "float_type": "a finite number",
        "finite_number": "a finite number", "string_type": "a string", "tuple_type": "a list",
        "dict_type": "a mapping", "model_type": "a mapping", "model_attributes_type": "a mapping",
    }  # fmt: skip
    hint = f"; write [{value}]" if kind == "tuple_type" and isinstance(value, str | int | float) else ""
    return f"expected {names[kind]}, found {describe(value)}{hint}" if kind in names else str(found["msg"])


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def below(path: str, rest: str) -> str:
    """The dotted path of what is below another one: a key, an item such as ``[1]``, or nothing."""
    return path + rest if rest.startswith("[") or not rest else join(path, rest)


def dotted(place: list[Any]) -> str:
    """``("evaluation", "scales", 1)`` as ``evaluation.scales[1]``."""
    text = ""
    for part in place:
        text = f"{text}[{part}]" if isinstance(part, int) and text else join(text, str(part))
    return text


def describe(value: object) -> str:
    """A value and its type, for people."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping | BaseModel):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    kind = {int: "an integer", float: "a number", str: "a string"}.get(type(value), type(value).__name__)
    return f"{value!r} ({kind})"


def unknown(word: str, place: list[str], kind: type[BaseModel]) -> str:
    """The reason for refusing a key: the nearest one of its section, else of any section, else all of its section."""
    own: type[BaseModel] = kind
    for part in place:
        own = subsection(own.model_fields[part]) or own
    path = ".".join(place)
    if guess := nearest(word, tuple(own.model_fields)):
        return f"unknown key; did you mean {join(path, guess)}?"
    leaves = {known.path.rsplit(".", 1)[-1]: known.path for known in keys(kind)}
    if guess := nearest(word, tuple(leaves)):
        return f"unknown key; did you mean {leaves[guess]}?"
    return f"unknown key; known are {', '.join(own.model_fields)}"


def plain(value: object, path: str = "") -> Any:
    """A plain YAML value: mappings, lists, texts, finite numbers, true, false and null.

    Raises:
        Mistake: naming the place below the value.
    """
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise Mistake(path, f"keys must be strings, found {describe(name)}; put it in quotes")
        return {name: plain(item, join(path, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{path}[{place}]") for place, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise Mistake(path, f"expected a plain, finite value, found {describe(value)}")
