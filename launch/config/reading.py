"""YAML text of configs, read strictly and written back.

The scalars are those of YAML 1.2: ``5e-4`` is a number, ``no`` and ``on`` are strings, ``1:30`` is one too. A key that
stands twice in a mapping is refused.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import yaml

from dso.errors import UserError


class ConfigError(UserError):
    """A config that cannot be used; ``path`` is the dotted path of the value that is wrong."""

    def __init__(self, reason: str, path: str = "") -> None:
        super().__init__(f"{path}: {reason}" if path else reason)
        self.reason = reason
        self.path = path


def join(path: str, key: str) -> str:
    """The dotted path of ``key`` below ``path``."""
    return f"{path}.{key}" if path else key


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


def dump_yaml(values: object) -> str:
    """Plain values as YAML text, which :func:`parse_yaml` reads back as they are."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_override(text: str) -> tuple[str, object]:
    """``"train.max_steps=50"`` as its dotted path and its value, which is read as YAML.

    Raises:
        ConfigError: if there is no ``=``, a part of the path is empty, or the value is not YAML.
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ConfigError(f"override {text!r}: expected key=value with a dotted key, as in train.max_steps=50")
    try:
        return path, parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"override {text!r}: {error}") from error
