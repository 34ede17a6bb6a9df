"""What README.md, CONTRIBUTING.md and docs/ show is true: their Python runs, their commands and links exist.

Conventions:

- ```` ```python ```` blocks of a file run in order, in one namespace, in an empty folder that holds a tiny model in
  ``path/to/model`` and a steering for it in ``path/to/steering``. The strings ``"smollm2-135m"`` and ``"runs/..."``
  stand for these two. A block right below the line ``<!-- not run -->`` is only compiled.
- In ```` ```console ```` blocks the lines that start with ``$`` are commands, in ```` ```bash ```` blocks all are.
  ``make`` targets, ``dso`` subcommands with their options, the configs and overrides of ``dso train`` and ``dso
  freeform``, modules of ``python -m``, and what ``tools.bench`` is given must exist; other commands are not looked at.
  Words in capitals stand for anything.
- A paragraph of nothing but capitals is a place that was to be filled in.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from launch.config.schema import load_config
from tools.bench.cli import build_parser

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^(?P<before>[^\n]*)\n```(?P<kind>\w+)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
STANDS_FOR = ((r'"smollm2-135m"', '"path/to/model"'), (r'"runs/[^"]*"', '"path/to/steering"'))


class Block(NamedTuple):
    kind: str
    body: str
    line: int
    runs: bool


def blocks(text: str, *kinds: str) -> list[Block]:
    found = FENCE.finditer("\n" + text)
    all_of_them = [
        Block(b["kind"], b["body"], text[: b.start("body")].count("\n"), b["before"].strip() != "<!-- not run -->")
        for b in found
    ]
    return [block for block in all_of_them if block.kind in kinds]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in the shell blocks."""
    for block in blocks(text, "console", "bash", "sh"):
        lines = block.body.replace("\\\n", " ").splitlines()
        if block.kind == "console":
            lines = [line.removeprefix("$") for line in lines if line.startswith("$")]
        for line in lines:
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            for ends, part in itertools.groupby(words, lambda word: set(word) <= set("&|;")):
                call = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, part))
                if call and not ends:
                    yield [Path(call[0]).name, *call[1:]]


def documented(*programs: str) -> list[list[str]]:
    """The commands of all files that call one of ``programs``."""
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in FILES]
    found = [words for text in texts for words in commands(text) if words[0] in programs]
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


def test_blocks_and_commands_are_found() -> None:
    python = "a\n<!-- not run -->\n```python\nx = 1\n```\n\n"
    console = "```console\n$ A=1 bin/make x 'B=2; 3'  # why\nout | put\n$ y \\\n  z | w && v\n```\n"
    assert blocks(python + console, "python") == [Block("python", "x = 1\n", 3, False)]
    assert list(commands(python + console)) == [["make", "x", "B=2; 3"], ["y", "z"], ["w"], ["v"]]


# Commands


@pytest.mark.parametrize("words", documented("make"), ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", documented("dso"), ids=" ".join)
def test_dso_commands_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from launch.cli import main

    subcommand = [word for word in words[1:2] if not word.startswith("-")]
    with pytest.raises(SystemExit) as ended:
        main([*subcommand, "--help"])
    assert ended.value.code == 0
    known = set(re.findall(r"--?[a-z][a-z-]*", capsys.readouterr().out))
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= known
    if subcommand in (["train"], ["freeform"]):
        config, *rest = (word for word in words[2:] if not word.startswith("-"))
        if not config.isupper():
            load_config(config, [word for word in rest if "=" in word])


@pytest.mark.parametrize("words", documented("python", "python3"), ids=" ".join)
def test_python_modules_exist(words: list[str]) -> None:
    if words[1:2] == ["-m"]:
        assert importlib.util.find_spec(words[2]) is not None
    if words[1:3] == ["-m", "tools.bench"]:
        build_parser().parse_args(words[3:])  # which exits where an option is not known


# Text


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(name: str) -> None:
    text = FENCE.sub("", (ROOT / name).read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / name).parent.joinpath(link.partition("#")[0]).exists()] == []
    assert re.findall(r"^[A-Z][A-Z ]+$", text, re.MULTILINE) == []


# Python


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model in path/to/model and a steering for it in path/to/steering."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dso import Steering

    home = tmp_path_factory.mktemp("docs")
    letters = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(home / "path/to/model")
    fast.save_pretrained(home / "path/to/model")
    steering = Steering.for_model(model)
    for operator in steering.operators.values():
        operator.a.data.fill_(0.1)  # a steering that does nothing cannot be exported
    steering.save_pretrained(home / "path/to/steering")
    return home


@pytest.mark.parametrize("name", FILES)
def test_python_blocks_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    assert name != "README.md" or any(block.runs for block in blocks((ROOT / name).read_text("utf-8"), "python"))
    for block in blocks((ROOT / name).read_text(encoding="utf-8"), "python"):
        source = block.body
        for pattern, replacement in STANDS_FOR:
            source = re.sub(pattern, replacement, source)
        code = compile("\n" * block.line + source, str(ROOT / name), "exec")  # line numbers are the file's
        if block.runs:
            exec(code, namespace)
