"""The layout: imports run one way, the core stays light, the command line answers at once, nothing names a machine."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = ("dso", "envs", "trainers", "launch", "configs", "tools")  # each may import itself and what stands before it
NO_CORE = {"gymnasium", "stable_baselines3", "wandb", "trl", "deepspeed", "tensorboard", "envs", "trainers", "launch"}
FETCHING = {(Path("dso/steering/hub.py"), "wandb")}  # a steering is loaded from an artifact as it is from the Hub
CORE = {"dso", "torch", "transformers", "safetensors", "numpy", *sys.stdlib_module_names}
SKIPPED = {"build", "dist", "runs", "wandb", "__pycache__"}


def modules(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level name of everything that is imported below ``tree``, by statement or by name."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names = [node.args[0].value]
        for name in names:
            yield getattr(node, "lineno", 0), name.split(".")[0]


def module_level(tree: ast.Module) -> ast.Module:
    """The statements that run on import: no functions, no ``if TYPE_CHECKING``."""

    def kept(body: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                result += kept(node.orelse)
            elif isinstance(node, ast.ClassDef):
                result += kept(node.body)
            else:
                result.append(node)
        return result

    return ast.Module(kept(tree.body), [])


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import a.b, c
from d.e import f
from . import g
def function():
    import h
    importlib.import_module("i.j")
"""
    tree = ast.parse(source)
    assert sorted(imports(tree)) == [(2, "a"), (2, "c"), (3, "d"), (6, "h"), (7, "i")]
    assert sorted(imports(module_level(tree))) == [(2, "a"), (2, "c"), (3, "d")]


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    later = set(ORDER[ORDER.index(package) + 1 :])
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name in later
    ]
    assert not wrong


def file_imports(path: Path) -> set[Path]:
    """The files of this project that a file imports, wherever the statement stands."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = ROOT.joinpath(*name.split("."))
            found |= {file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()}
    return found - {path}


def circles(graph: dict[Path, set[Path]]) -> list[list[Path]]:
    """The groups of files of which each reaches each other (Tarjan's strongly connected components)."""
    number: dict[Path, int] = {}
    low: dict[Path, int] = {}
    stack: list[Path] = []
    found: list[list[Path]] = []

    def visit(path: Path) -> None:
        number[path] = low[path] = len(number)
        stack.append(path)
        for other in sorted(graph.get(path, set())):
            if other not in number:
                visit(other)
            if other in stack:
                low[path] = min(low[path], low[other])
        if low[path] == number[path]:
            group = stack[stack.index(path) :]
            del stack[stack.index(path) :]
            if len(group) > 1:
                found.append(sorted(group))

    for path in sorted(graph):
        if path not in number:
            visit(path)
    return found


def test_circles_are_found() -> None:
    a, b, c, d = (Path(name) for name in "abcd")
    assert circles({a: {b}, b: {c}, c: {b}, d: {a}}) == [[b, c]]
    assert circles({a: {b, c}, b: {c}, c: set(), d: {a}}) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {path: file_imports(path) for path in modules(*ORDER)}
    found = circles(graph)
    assert not [" <-> ".join(str(path.relative_to(ROOT)) for path in group) for group in found]


def test_the_core_names_no_library_of_training() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("dso")
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if name in NO_CORE and (path.relative_to(ROOT), name) not in FETCHING
    ]
    assert not wrong


def test_the_core_needs_only_its_dependencies_to_be_imported() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules("dso")
        for line, name in imports(module_level(ast.parse(path.read_text(encoding="utf-8"))))
        if name not in CORE
    ]
    assert not wrong


def test_environments_hold_no_optimiser() -> None:
    for path in modules("envs"):
        text = path.read_text(encoding="utf-8")
        assert not {name for _, name in imports(ast.parse(text))} & {"stable_baselines3", "trl", "deepspeed", "wandb"}
        assert "torch.optim" not in text, path


def loaded(code: str) -> set[str]:
    """The top-level modules that are loaded after ``code`` ran in a fresh interpreter."""
    code += "\nimport sys\nprint('LOADED', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_core_loads_no_library_of_training() -> None:
    everything = "import dso\nfor name in dso.__all__: getattr(dso, name)"
    heavy = {"gymnasium", "stable_baselines3", "wandb", "trl", "deepspeed", "matplotlib"}
    after = loaded(everything)
    assert "torch" in after
    assert not after & heavy
    assert "torch" not in loaded("import dso")


def test_training_loads_no_launcher_and_no_tracker() -> None:
    assert not loaded("import envs, trainers") & {"deepspeed", "wandb", "trl"}


def test_help_answers_in_under_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "launch.cli", "--help"], cwd=ROOT, capture_output=True, text=True)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: dso")
    assert min(times) < 2.0  # one second, and as much again for a machine with other work


def test_parsing_the_command_line_loads_no_torch() -> None:
    code = "import contextlib, launch.cli\nwith contextlib.suppress(SystemExit): launch.cli.main(['--help'])"
    assert not loaded(code) & {"torch", "transformers", "numpy", "gymnasium", "stable_baselines3", "matplotlib"}


def texts() -> Iterator[tuple[Path, str]]:
    for folder, below, names in os.walk(ROOT):
        below[:] = [name for name in below if name == ".ci" or not (name.startswith(".") or name in SKIPPED)]
        for name in names:
            path = Path(folder, name)
            try:
                yield path.relative_to(ROOT), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_file_names_a_machine_or_a_registry() -> None:
    own = Path(__file__).relative_to(ROOT)
    forbidden = re.compile(r"/(?:home|root|Users)/\w|pypi\.org|pythonhosted|pytorch\.org/whl|--(?:extra-)?index-url")
    wrong = [f"{path}: {found[0]}" for path, text in texts() if path != own and (found := forbidden.search(text))]
    assert not wrong


def test_the_constraints_pin_exact_public_versions() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", pin) for pin in pins)
    assert {"torch==2.13.0", "transformers==5.23.0", "stable_baselines3==2.9.2", "gymnasium==1.4.0"} <= set(pins)
    names = [re.split("==", pin)[0].lower().replace("_", "-") for pin in pins]
    assert len(set(names)) == len(names)


def test_make_train_goes_on_with_a_run_that_is_there_unless_it_is_to_be_replaced() -> None:
    def command(*words: str) -> str:
        # Without what a `make test ARGS=...` above hands on to every make below it.
        own = {
            key: value
            for key, value in os.environ.items()
            if key not in ("ARGS", "CONFIG", "MAKEFLAGS", "MAKEOVERRIDES")
        }
        plain = ["make", "-n", "train", *words]
        done = subprocess.run(plain, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
        return next(line for line in done.stdout.splitlines() if "dso train" in line).split("dso train ")[1]

    assert command().split() == ['"smollm2-roles"', "--resume", "auto"]
    assert command("ARGS=--overwrite", "CONFIG=mine").split() == ['"mine"', "--overwrite"]


def test_ci_calls_the_one_verb_and_nothing_more() -> None:
    script = ROOT / ".ci" / "run"
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "exec make test"
    assert os.access(script, os.X_OK)
