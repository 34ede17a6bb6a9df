"""Strict typed configs: nested frozen dataclasses filled from YAML text, and written back.

Every key must be known and every value of its declared type; a mistake is a :class:`ConfigError` that names the
dotted path, what was expected, what was found and the nearest known key. Types that fields may have: ``bool``,
``int``, ``float``, ``str``, ``Literal`` of strings, ``X | None``, ``tuple[X, ...]``, ``dict[str, X]``, ``Any`` (plain
YAML values) and other dataclasses.

The scalars are those of YAML 1.2: ``5e-4`` is a number, ``no`` and ``on`` are strings, ``1:30`` is one too.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from dso.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A config that cannot be used; ``path`` is the dotted path of the value that is wrong."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.path = path


def join(path: str, key: str) -> str:
    """The dotted path of ``key`` below ``path``."""
    return f"{path}.{key}" if path else key


def require(condition: bool, path: str, reason: str) -> None:
    """Raise a :class:`ConfigError` about ``path`` unless ``condition`` holds."""
    if not condition:
        raise ConfigError(reason, path)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    lowered = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


# YAML text


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without duplicate keys."""

    yaml_implicit_resolvers: dict = {}

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        return super().construct_object(node, deep=True)  # depth first: a list that holds itself is refused

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"line {line}: the key {key.value!r} was given before, on line {seen[key.value]}")
            if isinstance(key, yaml.ScalarNode):
                seen[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))  # YAML 1.1 would read 010 as octal


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes the strings which :class:`_Loader` would read as something else."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        # Unquoted, PyYAML turns the line breaks of Unicode (as U+0085) into blanks.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str) -> object:
    """The plain value that ``text`` stands for.

    Raises:
        ConfigError: if it is not YAML, with line and column, or a key stands twice in a mapping.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{where}not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"not valid YAML: {error}") from error


def to_dict(config: Any) -> Any:
    """A config as plain dicts, lists and scalars, in the order of its fields."""
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def dump_yaml(config: object) -> str:
    """All values of a config as YAML text; :func:`parse_yaml` and :func:`build` give an equal config back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


# Values of a declared type


def build(cls: type[T], raw: object, path: str = "", root: type | None = None) -> T:
    """An instance of the dataclass ``cls`` from a plain mapping.

    Raises:
        ConfigError: on an unknown key, a value of the wrong type, or one that ``cls.__post_init__`` refuses.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected a mapping, found {_describe(raw)}", path)
    kinds = _kinds(cls)
    for key in raw:
        if not isinstance(key, str):
            raise ConfigError(f"keys must be strings, found {_describe(key)}", path)
        if key not in kinds:
            raise ConfigError(_unknown(key, path, cls, root or cls), join(path, key))
    values = {key: convert(kinds[key], value, join(path, key), root or cls) for key, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(error.reason, join(path, error.path) if error.path else path) from None


def convert(kind: Any, value: object, path: str, root: type) -> Any:
    """``value`` as the declared type ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if _is_section(kind):
        return build(kind, value, path, root)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else convert(inner, value, path, root)
    if origin is Literal:
        return _choice(arguments, value, path)
    if origin is tuple:
        return tuple(convert(arguments[0], item, f"{path}[{i}]", root) for i, item in enumerate(_list(value, path)))
    if origin is dict:
        return {key: convert(arguments[1], item, join(path, key), root) for key, item in _mapping(value, path).items()}
    if kind is Any:
        return _plain(value, path)
    return _scalar(kind, value, path)


def _choice(choices: tuple, value: object, path: str) -> object:
    if isinstance(value, str) and value in choices:
        return value
    guess = nearest(value, choices) if isinstance(value, str) else None
    hint = f"; did you mean {guess}?" if guess else ""
    raise ConfigError(f"expected one of {', '.join(map(str, choices))}, found {_describe(value)}{hint}", path)


def _list(value: object, path: str) -> list:
    if isinstance(value, list):
        return value
    hint = f"; write [{value}]" if isinstance(value, str | int | float) else ""
    raise ConfigError(f"expected a list, found {_describe(value)}{hint}", path)


def _mapping(value: object, path: str) -> dict:
    if not isinstance(value, dict):
        raise ConfigError(f"expected a mapping, found {_describe(value)}", path)
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"keys must be strings, found {_describe(key)}; put it in quotes", path)
    return value


def _plain(value: object, path: str) -> object:
    if isinstance(value, dict):
        return {key: _plain(item, join(path, key)) for key, item in _mapping(value, path).items()}
    if isinstance(value, list):
        return [_plain(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ConfigError(f"expected a plain, finite value, found {_describe(value)}", path)


_NAMES = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def _scalar(kind: type, value: object, path: str) -> object:
    if type(value) is kind and value not in (math.inf, -math.inf):
        return value
    if kind is float and type(value) is int and abs(value) < 10**300:
        return float(value)
    raise ConfigError(f"expected {_NAMES[kind]}, found {_describe(value)}", path)


def _describe(value: object) -> str:
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    kind = {int: "an integer", float: "a number", str: "a string"}.get(type(value), type(value).__name__)
    return f"{value!r} ({kind})"


# Keys


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _kinds(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def paths(cls: Any, path: str = "") -> Iterator[str]:
    """The dotted path of every value of a dataclass and the dataclasses in it."""
    for key, kind in _kinds(cls).items():
        if _is_section(kind):
            yield from paths(kind, join(path, key))
        else:
            yield join(path, key)


def _unknown(key: str, path: str, cls: type, root: type) -> str:
    """The reason for refusing a key: the nearest one of its section, else of any section, else all of its section."""
    if guess := nearest(key, tuple(_kinds(cls))):
        return f"unknown key; did you mean {join(path, guess)}?"
    leaves = {known.rsplit(".", 1)[-1]: known for known in paths(root)}
    if guess := nearest(key, tuple(leaves)):
        return f"unknown key; did you mean {leaves[guess]}?"
    return f"unknown key; known are {', '.join(_kinds(cls))}"


# Overrides


def parse_override(text: str) -> tuple[str, object]:
    """``"train.steps=50"`` as its dotted path and its value, which is read as YAML.

    Raises:
        ConfigError: if there is no ``=``, a part of the path is empty, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ConfigError(f"override {text!r}: expected key=value with a dotted key, as in train.steps=50")
    try:
        return path, parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"override {text!r}: {error}") from error


def override(cls: type, raw: object, path: str, value: object) -> dict:
    """A copy of the plain mapping ``raw`` for ``cls`` with the value at the dotted ``path`` replaced."""
    kind: Any = cls
    copy = top = dict(raw) if isinstance(raw, Mapping) else {}
    *parents, last = path.split(".")
    for depth, key in enumerate(parents, 1):
        kind = _kinds(kind).get(key) if _is_section(kind) else None
        below = copy.get(key)
        if below is not None and not isinstance(below, dict):
            raise ConfigError(f"expected a mapping, found {_describe(below)}", ".".join(parents[:depth]))
        copy[key] = dict(below or {})
        copy = copy[key]
    section = _kinds(kind).get(last) if _is_section(kind) else None
    if _is_section(section):
        example = join(path, next(iter(_kinds(section))))
        raise ConfigError(f"this is a section; set its values one by one, as in {example}=...", path)
    copy[last] = value
    return top
