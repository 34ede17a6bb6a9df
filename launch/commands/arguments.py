"""Arguments that several commands of ``dso`` take, and how their values are read. Light, as the parsers beside it."""

from __future__ import annotations

import argparse

STATED = "base model (default: the one the steering states)"
OWN_SCALE = "(default: the steering's own, which is 1 unless dso calibrate has set it)"
DTYPES = ("float32", "bfloat16", "float16")


def add_model(command: argparse._ActionsContainer, what: str = STATED) -> None:
    """The arguments of a command that loads a model."""
    command.add_argument("--model", help=what)
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: float32)")
    command.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, else the CPU)")


def add_option(command: argparse._ActionsContainer) -> None:
    """The argument of a command that reads a decision set."""
    text = "of the decision set, repeatable"
    command.add_argument("--option", action="append", default=[], metavar="key=value", help=text)


def count(text: str) -> int:
    """A whole number from 0 on."""
    return _at_least(0, text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _at_least(1, text)


def _at_least(low: int, text: str) -> int:
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, found {text!r}")
    return int(text)
