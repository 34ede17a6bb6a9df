"""The command line. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from launch.commands.parsers import build_parser
from launch.exits import EXIT_INPUT, EXIT_STOPPED, is_main

PATIENCE = 4.0  # seconds
OWN = {"dso", "envs", "trainers", "launch", "configs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on stderr and exit code 2, a bug keeps its traceback."""
    _print_any_text()
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from dso.errors import UserError

    try:
        code = import_module(f"launch.commands.{arguments.command}").run(arguments)
        sys.stdout.flush()  # here, where a reader that left can be told from a bug
        return code
    except KeyboardInterrupt:
        print("dso: interrupted", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        # The reader of our output left (as in `dso ... | head`); a second error at shutdown would be noise.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:
        if (error.name or "").split(".")[0] in OWN:
            raise
        _say(f"{error}; training needs: pip install 'dso[train]'")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}")
    except UserError as error:
        _say(str(error), secondhand=getattr(error, "secondhand", False))
    return EXIT_INPUT


def _print_any_text() -> None:
    """Let printing escape what the terminal's encoding lacks, such as "é" in ASCII, where it would fail."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _say(error: str, secondhand: bool = False) -> None:
    """Say why a command failed.

    Most failures are those of all processes alike, and one is enough to say so; one that only heard of another's
    failure lets that one speak first. Launchers end the other processes once the first has ended.
    """
    if secondhand or not is_main():
        time.sleep(3 * PATIENCE if secondhand else PATIENCE)
    if not is_main():
        process = f"process {os.environ['RANK']}: "
        error = process + error.removeprefix(process)
    print(f"dso: {error}", file=sys.stderr, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; overrides of a config may stand behind options, which argparse alone does not take."""
    parser = build_parser()
    arguments, left = parser.parse_known_args(_with_bare_resume(argv))
    trains = arguments.command in ("train", "freeform", "config")
    if left and (not trains or any(word.startswith("-") or "=" not in word for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides = [*arguments.overrides, *left]
    return arguments


def _with_bare_resume(argv: Sequence[str]) -> list[str]:
    """Keep a bare ``--resume`` from taking the config or an override that follows it for its value."""
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--resume" and words[place + 1 : place + 2] != ["auto"]:
            words[place] = "--resume=always"
    return words


if __name__ == "__main__":
    raise SystemExit(main())
