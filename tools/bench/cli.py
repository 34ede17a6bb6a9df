"""Benchmarks: ``python -m tools.bench NAME``; each prints a table and writes what it measured.

step         time and peak memory of one training step against a bare forward and backward pass of the same batch
run          one training run from an empty folder: wall time and peak memory
budgets      the default run at several KL budgets and seeds, on held-out splits
scaling      steps of 1 and 2 processes: decisions a second, exchanges, memory with and without checkpointing
estimators   regression, expected, reinforce, ppo and the published form: decisions until bias halves, bias at equal KL
groups       gender x race, four groups
transfer     trained steerings on sets they never saw: held-out occupations, WinoBias, pronouns
freeform     free-form answers of the embedded model: what is said before and after
overhead     time of prefill and decode with hooks, with a scale a row, and merged, against the base model; of imports
serve        tokens a second of dso serve's engine, with a scale for each row, against one answer after the other
editing      local contrastive editing: bias and perplexity along alpha, its nulls, and where the weights sit
adjudicate   two models judge each other's answers: how right is what they agree on
scenes       the embedded vision-language model: both planted associations before and after, and a sheet of pictures
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m tools.bench``."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")

    step = names.add_parser("step", help="one training step against a bare pass")
    step.add_argument("--repeats", type=int, default=5)
    step.add_argument("--config", default="smollm2-roles")

    run = names.add_parser("run", help="wall time and peak memory of a run")
    run.add_argument("--config", default="smollm2-roles")
    run.add_argument("--folder", help="where the run is kept (default: nowhere)")

    scaling = names.add_parser("scaling", help="steps of one process and of several")
    scaling.add_argument("--config", default="smollm2-roles")
    scaling.add_argument("--processes", default="1,2", help="numbers of processes (default: 1,2)")
    scaling.add_argument("--deepspeed", default="configs/deepspeed/zero2.json", metavar="FILE")
    scaling.add_argument("--steps", type=int, default=4, help="that are timed, after one more (default: 4)")
    scaling.add_argument("--rounds", type=int, default=2, help="in which measurements take turns (default: 2)")
    scaling.add_argument("--threads", type=int, help="of each process (default: the CPU's cores shared out)")
    scaling.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")

    for name, text in (
        ("budgets", "KL budgets x seeds"),
        ("estimators", "estimators x seeds"),
        ("groups", "gender x race"),
        ("scenes", "drawn scenes"),
    ):
        sweep = names.add_parser(name, help=text)
        sweep.add_argument("--seeds", default="0,1,2")
        sweep.add_argument("--only", help="comma-separated names of variants")
        sweep.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")
        if name == "budgets":
            sweep.add_argument("--budgets", default="0.3", help="(default: 0.3, the default config's)")
        if name == "estimators":
            sweep.add_argument("--kl", type=float, default=0.05, help="at which bias is compared (default: 0.05)")
            sweep.add_argument("--stride", type=int, default=3, help="take every so manieth context (default: 3)")
        if name == "scenes":
            sweep.add_argument("--sheet", default="docs/scenes.png", help="where the pictures with answers are written")

    freeform = names.add_parser("freeform", help="free-form answers before and after")
    freeform.add_argument("--config", default="smollm2-roles-freeform", help="(default: smollm2-roles-freeform)")
    freeform.add_argument("--seeds", default="0", help="none trains nothing (default: 0)")
    freeform.add_argument("--also", action="append", default=[], metavar="STEERING", help="measure this one too")
    freeform.add_argument("overrides", nargs="*", metavar="key=value", help="of the config")

    transfer = names.add_parser("transfer", help="sets that were never trained on")
    transfer.add_argument("steerings", nargs="+", help="folders of steerings")
    transfer.add_argument("--winobias", help="folder with the published WinoBias files")
    transfer.add_argument("--splits", default="test-people,test-names,test-templates,test-contexts")

    serve = names.add_parser("serve", help="tokens a second of dso serve's engine")
    serve.add_argument("steering", help="folder of a steering")
    serve.add_argument("--model", help="base model (default: the one that the steering states)")
    serve.add_argument("--requests", type=int, default=32, help="at once, at most 32 (default: 32)")
    serve.add_argument("--tokens", type=int, default=48, help="of each answer (default: 48)")
    serve.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    serve.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of a machine that is shared")

    harm = names.add_parser("harm", help="what steerings cost where nothing should move")
    harm.add_argument("steerings", nargs="+", help="folders of steerings")
    harm.add_argument("--arc", required=True, metavar="CSV", help="ARC-Easy as published: question, options, letter")
    harm.add_argument("--limit", type=int, help="questions (default: all)")
    harm.add_argument("--scale", default="1", help="of the steerings, or several as in 1,0.5 (default: 1)")

    editing = names.add_parser("editing", help="local contrastive editing of fine-tuned copies")
    editing.add_argument("--model", default="smollm2-135m")
    editing.add_argument("--folder", default="runs/bench/editing", help="of the fine-tuned copies, made if need be")
    editing.add_argument("--couples", type=int, default=20, help="of roles' validation split (default: 20)")
    editing.add_argument("--stride", type=int, default=5, help="each couple in every so manieth context (default: 5)")
    editing.add_argument("--texts", type=int, default=40, help="neutral ones, for perplexity (default: 40)")
    editing.add_argument("--k", type=float, default=0.005, help="share of the weights (default: 0.005)")

    adjudicate = names.add_parser("adjudicate", help="two models judge each other's answers")
    adjudicate.add_argument("--first", default="smollm2-135m", help="(default: smollm2-135m)")
    adjudicate.add_argument("--first-patch", metavar="DIR", help="a patch of dso patch on it")
    adjudicate.add_argument("--second", required=True, help="a model, the same one with a patch, or another")
    adjudicate.add_argument("--second-patch", metavar="DIR", help="a patch of dso patch on it")
    adjudicate.add_argument("--scale", type=float, default=1.0, help="of the patches (default: 1)")
    adjudicate.add_argument("--couples", type=int, default=12, help="in two contexts and both orders (default: 12)")
    adjudicate.add_argument("--facts", type=int, default=48, help="unambiguous decisions (default: 48)")
    adjudicate.add_argument("--support", type=float, default=0.55, help="share of a judge's yes (default: 0.55)")
    adjudicate.add_argument("--near", type=float, default=0.15, help="to equal shares (default: 0.15)")

    overhead = names.add_parser("overhead", help="what steering costs at inference")
    overhead.add_argument("--model", default="smollm2-135m")
    overhead.add_argument("--dtype", default="float32")
    overhead.add_argument("--operator", default="scale", help="(default: scale, the default run's)")
    overhead.add_argument("--batch", type=int, default=4)
    overhead.add_argument("--prompt", type=int, default=64, help="tokens (default: 64)")
    overhead.add_argument("--new", type=int, default=16, help="tokens, one by one (default: 16)")
    overhead.add_argument("--rounds", type=int, default=10)
    overhead.add_argument("--compiled", action="store_true", help="compiled models too, which takes minutes")
    overhead.add_argument("--imports", type=int, default=0, metavar="N", help="time imports, N times (default: 0)")
    overhead.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of a machine that is shared")

    for sub in names.choices.values():
        # Not docs/results, which keeps what is published: a sweep of other settings would write over it.
        sub.add_argument("--results", default="runs/bench", help="folder for what was measured (default: runs/bench)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark."""
    arguments = build_parser().parse_args(argv)
    from dso.errors import UserError
    from launch.run.train import Stopped
    from tools.bench import (
        adjudicating,
        answers,
        editing,
        estimators,
        harm,
        overhead,
        scaling,
        scenes,
        serving,
        sweeps,
        timing,
    )

    functions = {
        "step": timing.step,
        "run": timing.run,
        "scaling": scaling.scaling,
        "budgets": sweeps.budgets,
        "estimators": estimators.estimators,
        "groups": sweeps.groups,
        "transfer": sweeps.transfer,
        "scenes": scenes.scenes,
        "adjudicate": adjudicating.adjudicate,
        "editing": editing.editing,
        "harm": harm.harm,
        "overhead": overhead.overhead,
        "serve": serving.serve,
        "freeform": answers.freeform,
    }
    try:
        functions[arguments.name](arguments)
    except (UserError, Stopped) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0
