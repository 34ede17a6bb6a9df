"""What the commands of ``dso`` take. Light: nothing of a command is imported before its arguments are parsed."""

from __future__ import annotations

import argparse

from launch.commands.arguments import DTYPES, OWN_SCALE, STATED, add_model, add_option, count, positive
from launch.commands.evidence_parsers import add_evidence


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``dso``; each command is a file beside this one."""
    parser = argparse.ArgumentParser(
        prog="dso", description="Train and use steerings that make a model's decisions equiprobable across groups."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and end")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_training(commands.add_parser("train", help="train a steering from a config"), "train.max_steps=50")
    freeform = commands.add_parser("freeform", help="train, for configs of free-form answers; or measure such answers")
    _add_training(freeform, "train.estimator=rloo")
    freeform.add_argument("--measure", metavar="STEERING", help="ask with this steering instead of training; or 'none'")
    _add_config(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_merge(commands)

    generate = commands.add_parser("generate", help="generate text with a steered model")
    generate.add_argument("steering", help="folder or Hub id of a steering, or folder of a patch")
    generate.add_argument("prompt", help="the text to go on from")
    generate.add_argument("--scale", type=float, help=f"strength, 0 is the base model {OWN_SCALE}")
    add_model(generate)
    generate.add_argument("--chat", action="store_true", help="send the prompt as a user's chat message")
    generate.add_argument("--max-new-tokens", type=positive, default=40, help="(default: 40)")

    _add_export(commands)

    inspect = commands.add_parser("inspect", help="show what a steering states and which sites it moves most")
    inspect.add_argument("steering", help="folder or Hub id of a steering")
    inspect.add_argument("--top", type=count, default=10, help="sites to list (default: 10)")

    _add_serve(commands)
    add_evidence(commands)

    decisions = commands.add_parser("decisions", help="validate a decision set, count it, show examples")
    decisions.add_argument("set", help="name of a decision set or a .jsonl file")
    add_option(decisions)
    decisions.add_argument("--examples", type=count, default=3, help="of each split and kind (default: 3)")
    add_model(decisions, "show prompts as this model's template renders them")
    return parser


def _add_training(train: argparse.ArgumentParser, example: str) -> None:
    train.add_argument("config", help="name of a shipped config, or a path to a YAML file")
    _add_overrides(train, example)
    resume = "go on where the run was stopped; 'auto': start it if there is nothing to go on from"
    train.add_argument("--resume", choices=("always", "auto"), metavar="auto", nargs="?", const="always", help=resume)
    train.add_argument("--overwrite", action="store_true", help="replace a run folder of the same name")
    train.add_argument("--quiet", action="store_true", help="print only the result")
    train.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's configuration, for runs of a launcher")
    train.add_argument("--dry-run", action="store_true", help="say what the run will be and need, and load nothing")
    train.add_argument("--ranks", type=positive, default=1, help="with --dry-run: processes of the run (default: 1)")


def _add_config(commands: argparse._SubParsersAction) -> None:
    config = commands.add_parser("config", help="print a config with every value, or what configs may say")
    config.add_argument("config", nargs="?", help="name of a shipped config, or a path to a YAML file")
    _add_overrides(config, "train.estimator=ppo")
    config.add_argument("--schema", action="store_true", help="the JSON schema of configs")
    config.add_argument("--reference", action="store_true", help="the reference of all keys, as Markdown")


def _add_overrides(command: argparse.ArgumentParser, example: str) -> None:
    # With a default, argparse does not call them required where the config is missing.
    text = f"settings of the config, e.g. {example}"
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=text)


class _Version(argparse.Action):
    """Print the version; the package is imported only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from dso import __version__

        print(f"dso {__version__}")
        parser.exit()


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    evaluate = commands.add_parser("evaluate", help="measure a steering, or a base model, on a decision set")
    evaluate.add_argument(
        "steering", help="folder or Hub id of a steering, or a patch; 'none' for the base model alone"
    )
    add_model(evaluate)
    evaluate.add_argument("--set", default="roles", help="name of a decision set or a .jsonl file (default: roles)")
    add_option(evaluate)
    evaluate.add_argument("--split", default="test", help="split to measure (default: test)")
    evaluate.add_argument("--scales", help=f"comma-separated, beside the base model's 0 {OWN_SCALE}")
    evaluate.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="group=share",
        help="fair shares, repeatable (default: those the steering states)",
    )
    evaluate.add_argument("--bootstrap", type=positive, default=1000, help="resamples of the intervals (default: 1000)")
    evaluate.add_argument("--contexts", type=count, default=0, metavar="N", help="also list the N most biased contexts")
    evaluate.add_argument("--json", metavar="FILE", help="also write the points to a file")
    evaluate.add_argument("--figure", metavar="FILE", help="also draw them into a PNG")
    evaluate.add_argument("--quiet", action="store_true", help="print only the table")


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser("compare", help="a config's steering against every rival, or two steerings")
    compare.add_argument(
        "what",
        nargs="+",
        metavar="CONFIG [key=value ...] | STEERING STEERING",
        help="a config, whose steering and rivals are trained, tuned and measured into a report; or two steerings, "
        "folders or Hub ids, each with its scale as in FOLDER@0.5 (default: its own), 'none' for the base model",
    )
    study = compare.add_argument_group("of a config")
    study.add_argument(
        "--methods", default="rivals", help="comma-separated names, or: rivals, ablations, all (default: rivals)"
    )
    study.add_argument("--seeds", default="0,1,2", help="(default: 0,1,2)")
    study.add_argument(
        "--seconds", type=_seconds, default=180.0, help="for making and tuning a method with a seed (default: 180)"
    )
    study.add_argument("--out", metavar="DIR", help="folder of the report (default: runs/CONFIG-compare)")
    text = "published benchmarks, as of dso benchmark, that tell of attributes beside the one that is steered"
    study.add_argument("--data", metavar="DIR", help=text)
    study.add_argument("--limit", type=positive, metavar="N", help="items of each of them (default: all)")
    add_option(compare)
    compare.add_argument("--quiet", action="store_true", help="print only the result")
    pair = compare.add_argument_group("of two steerings")
    add_model(pair, "base model (default: the one the steerings state)")
    pair.add_argument("--set", default="roles", help="name of a decision set or a .jsonl file (default: roles)")
    pair.add_argument("--split", default="test", help="split to measure (default: test)")
    pair.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="group=share",
        help="fair shares, repeatable (default: those the first steering states)",
    )
    pair.add_argument("--bootstrap", type=positive, default=1000, help="resamples of the intervals (default: 1000)")
    pair.add_argument("--json", metavar="FILE", help="also write the figures to a file")


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser("merge", help="write a plain model folder with a steering merged into the weights")
    merge.add_argument("steering", help="folder or Hub id of a steering")
    merge.add_argument("--scale", type=float, help=f"strength, fixed from then on {OWN_SCALE}")
    merge.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    merge.add_argument("--model", help=STATED)
    merge.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the one they are stored in)")
    merge.add_argument("--allow-partial", action="store_true", help="leave out what has no place in the architecture")
    merge.add_argument("--allow-rounding", action="store_true", help="accept changes that vanish in the dtype")
    text = "set to measure on what is left out: a name or a .jsonl file (default: that of the steering's run)"
    merge.add_argument("--decisions", metavar="SET", help=text)
    add_option(merge)
    merge.add_argument("--split", default="test", help="of --decisions (default: test)")

    unmerge = commands.add_parser("unmerge", help="write the model of a merged folder without the steering")
    unmerge.add_argument("folder", help="that dso merge has written")
    unmerge.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    unmerge.add_argument("--steering", help="folder or Hub id (default: the one that was named when it was merged)")
    unmerge.add_argument("--model", help="base model to compare with (default: the one that is named there)")
    unmerge.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the base model's)")

    verify = commands.add_parser("verify", help="ask a merged folder, or a server, whether it runs the merged weights")
    verify.add_argument("folder", help="that dso merge has written")
    verify.add_argument("--url", help="of a server with OpenAI's completions, as in http://localhost:8000/v1")
    verify.add_argument("--model", help="its name on that server (default: the first that the server lists)")


def _add_export(commands: argparse._SubParsersAction) -> None:
    export = commands.add_parser("export", help="write a steering as an adapter that other programs load")
    export.add_argument("steering", help="folder or Hub id of a steering")
    export.add_argument("--to", required=True, choices=("lora", "ln-tuning", "gguf-lora"), help="the adapter's format")
    export.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    export.add_argument("--scale", help=f"strength; with several, as in 0.25,0.5,1, a folder in DIR each {OWN_SCALE}")
    export.add_argument("--rank", type=positive, metavar="K", help="keep the K strongest slopes of each site")
    export.add_argument("--allow-partial", action="store_true", help="leave out what the format cannot hold")
    export.add_argument("--tied-head", action="store_true", help="with lora: also change a head tied to the embedding")
    export.add_argument("--decisions", metavar="SET", help="measure on these what the adapter lacks")
    export.add_argument("--split", default="test", help="split to measure (default: test)")
    add_option(export)
    add_model(export)


def _add_serve(commands: argparse._SubParsersAction) -> None:
    text = "serve a steered model: OpenAI's protocol with a scale for each request, and a playground in the browser"
    serve = commands.add_parser("serve", help=text, epilog="The environment variable DSO_API_KEY sets an API key.")
    serve.add_argument("steering", help="folder or Hub id of a steering")
    add_model(serve)
    serve.add_argument("--scale", type=float, help=f"of requests that name none {OWN_SCALE}")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: 127.0.0.1)")
    serve.add_argument("--port", type=count, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--max-rows", type=positive, default=32, help="answers written side by side (default: 32)")
    serve.add_argument("--max-queue", type=positive, default=512, help="answers that may wait (default: 512)")
    serve.add_argument("--max-tokens", type=positive, default=1024, help="of one answer (default: 1024)")
    serve.add_argument("--max-body", type=positive, default=1_000_000, help="bytes of a request (default: 1000000)")


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, found {text!r}")
    return found
