"""The command line. Nothing heavy is imported before the arguments are parsed."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

EXIT_INPUT = 2
EXIT_STOPPED = 130  # by Ctrl-C; what was done is saved
EXIT_PREEMPTED = 75  # by SIGTERM, likewise (EX_TEMPFAIL: the same command with --resume auto goes on)
PATIENCE = 4.0  # seconds
OWN = {"dso", "envs", "trainers", "launch", "configs"}


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``dso``; each command's function is in ``launch.commands.verbs``."""
    parser = argparse.ArgumentParser(
        prog="dso", description="Train and use steerings that make a model's decisions equiprobable across groups."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a steering from a config")
    train.add_argument("config", help="name of a shipped config, or a path to a YAML file")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the config, e.g. train.steps=50")
    resume = "go on where the run was stopped; 'auto': start it if there is nothing to go on from"
    train.add_argument("--resume", choices=("always", "auto"), metavar="auto", nargs="?", const="always", help=resume)
    train.add_argument("--overwrite", action="store_true", help="replace a run folder of the same name")
    train.add_argument("--quiet", action="store_true", help="print only the result")
    train.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's configuration, for runs of a launcher")
    train.add_argument("--dry-run", action="store_true", help="say what the run will be and need, and load nothing")
    train.add_argument("--ranks", type=_positive, default=1, help="with --dry-run: processes of the run (default: 1)")

    _add_freeform(commands)
    _add_evaluate(commands)

    generate = commands.add_parser("generate", help="generate text with a steered model")
    generate.add_argument("steering", help="folder or Hub id of a steering")
    generate.add_argument("prompt", help="the text to go on from")
    generate.add_argument("--scale", type=float, default=1.0, help="strength, 0 is the base model (default: 1)")
    generate.add_argument("--model", help="base model (default: the one the steering states)")
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's chat message")
    generate.add_argument("--max-new-tokens", type=_positive, default=40, help="(default: 40)")

    inspect = commands.add_parser("inspect", help="show what a steering states and which sites it moves most")
    inspect.add_argument("steering", help="folder or Hub id of a steering")
    inspect.add_argument("--top", type=_count, default=10, help="sites to list (default: 10)")

    decisions = commands.add_parser("decisions", help="validate a decision set, count it, show examples")
    decisions.add_argument("set", help="name of a decision set or a .jsonl file")
    _add_option(decisions)
    decisions.add_argument("--examples", type=_count, default=3, help="of each split and kind (default: 3)")
    decisions.add_argument("--model", help="show prompts as this model's template renders them")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; what the user can mend is one line on stderr and exit code 2, a bug keeps its traceback."""
    arguments = _parse(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from dso.errors import UserError

    try:
        from launch.commands import verbs

        code = getattr(verbs, arguments.command)(arguments)
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


def is_main() -> bool:
    """Whether this process speaks for the run: the only one, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


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
    trains = arguments.command in ("train", "freeform")
    if left and (not trains or any(word.startswith("-") or "=" not in word for word in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides += left
    return arguments


def _with_bare_resume(argv: Sequence[str]) -> list[str]:
    """Keep a bare ``--resume`` from taking the config or an override that follows it for its value."""
    words = list(argv)
    for place, word in enumerate(words):
        if word == "--resume" and words[place + 1 : place + 2] != ["auto"]:
            words[place] = "--resume=always"
    return words


def _add_freeform(commands: argparse._SubParsersAction) -> None:
    freeform = commands.add_parser("freeform", help="train and measure on written answers, by GRPO or RLOO")
    freeform.add_argument("config", help="name of a config in configs/freeform, or a path to a YAML file")
    freeform.add_argument("overrides", nargs="*", metavar="key=value", help="settings, e.g. train.estimator=rloo")
    freeform.add_argument("--measure", metavar="STEERING", help="ask with this steering instead of training; or 'none'")
    freeform.add_argument("--overwrite", action="store_true", help="replace a run folder of the same name")
    freeform.add_argument("--quiet", action="store_true", help="print only the result")
    freeform.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's configuration, for runs of its launcher")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a steering, or a base model, on a decision set")
    evaluate.add_argument("steering", help="folder or Hub id of a steering; 'none' for the base model alone")
    evaluate.add_argument("--model", help="base model (default: the one the steering states)")
    evaluate.add_argument("--set", default="roles", help="name of a decision set or a .jsonl file (default: roles)")
    _add_option(evaluate)
    evaluate.add_argument("--split", default="test", help="split to measure (default: test)")
    evaluate.add_argument("--scales", default="1", help="comma-separated, beside the base model's 0 (default: 1)")
    evaluate.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="group=share",
        help="fair shares, repeatable (default: those the steering states)",
    )
    evaluate.add_argument(
        "--bootstrap", type=_positive, default=1000, help="resamples of the intervals (default: 1000)"
    )
    evaluate.add_argument(
        "--contexts", type=_count, default=0, metavar="N", help="also list the N most biased contexts"
    )
    evaluate.add_argument("--json", metavar="FILE", help="also write the points to a file")
    evaluate.add_argument("--figure", metavar="FILE", help="also draw them into a PNG")
    evaluate.add_argument("--quiet", action="store_true", help="print only the table")


def _add_option(command: argparse.ArgumentParser) -> None:
    text = "of the decision set, repeatable"
    command.add_argument("--option", action="append", default=[], metavar="key=value", help=text)


def _count(text: str) -> int:
    return _at_least(0, text)


def _positive(text: str) -> int:
    return _at_least(1, text)


def _at_least(low: int, text: str) -> int:
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {low}, found {text!r}")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
