"""The reference of a config's keys, docs/config.md, made from the sections themselves: ``dso config --reference``."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from launch.config.keys import SAME, Key, Section, facts_of, keys, subsection
from launch.config.reading import join
from launch.config.schema import TrainConfig

HEAD = """# Keys of a config

Made by `dso config --reference`; do not edit. `dso config smollm2-roles` prints a config with all of its values, and
`dso config --schema` the JSON schema that editors take.

A config is a YAML file, or the name of a shipped one, and `key=value` overrides behind it:

```console
$ dso train smollm2-roles train.max_steps=50 constraints.kl_budget=0.1 run.run_name=short
```

`train.estimator` says which trainer runs, and with it which keys there are. A key that would have no effect is
refused; what an override makes moot in a file is dropped. Keys marked ↻ may change when a run goes on with `--resume`.
Where a second default follows `free-form`, it is that of `grpo` and `rloo`. Numbers that are in
no config are in `launch/run/constants.py`.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true or false", Any: "any value"}


def reference() -> str:
    """The page, as Markdown."""
    return "\n".join([HEAD, *_sections(TrainConfig, ""), ""])


def _sections(kind: type[Section], path: str) -> Iterator[str]:
    """The tables of the sections in a section."""
    for name, field in kind.model_fields.items():
        below, place = subsection(field), join(path, name)
        if below is None:
            continue
        needs = "".join(f" Needs `{when}`." for when in facts_of(field).when)
        yield f"## {place}\n\n{(below.__doc__ or '').strip()}{needs}\n"
        yield "| key | type | default | |\n| --- | --- | --- | --- |"
        yield from (_row(key) for key in keys(below) if "." not in key.path)
        yield ""
        yield from _sections(below, place)


def _row(key: Key) -> str:
    default = _value(key.default)
    if key.facts.freeform is not SAME:
        default += f"; free-form {_value(key.facts.freeform)}"
    says = [str(key.field.description)]
    needs = [f"`{when}`" for when in key.facts.when if when.path.rpartition(".")[2] != key.path]  # not its own null
    if needs:
        says.append("needs " + " and ".join(needs))
    if key.facts.launcher:
        says.append("for runs of several processes")
    mark = " ↻" if key.facts.resumes else ""
    cells = (f"`{key.path}`{mark}", _type(key.field.annotation, key.field.metadata), default, "; ".join(says))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _type(kind: Any, bounds: list[Any]) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0], bounds)
    if origin is Literal:
        return ", ".join(inner)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type(part, bounds) for part in inner)
    if origin is tuple:
        return f"list of {_type(inner[0], [])}s"
    if origin is dict:
        return f"mapping to {_type(inner[1], [])}"
    return NAMES[kind] + _bounds(bounds)


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [f"{sign} {getattr(m, name)}" for m in metadata for name, sign in signs.items() if hasattr(m, name)]
    return f" {' and '.join(found)}" if found else ""
