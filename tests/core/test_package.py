"""The wheel: what is in it, and that every module of it imports from a clean environment outside the repository."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import dso

ROOT = Path(__file__).parents[2]
PACKAGES = ("dso", "envs", "trainers", "launch", "configs")
IMPORT_ALL = """
import importlib, pkgutil, sys
from pathlib import Path
home = Path(sys.prefix).resolve()
names = []
for package in sys.argv[1:]:
    names.append(package)
    path = importlib.import_module(package).__path__
    names += [found.name for found in pkgutil.walk_packages(path, package + ".") if not found.name.endswith("__main__")]
for name in names:
    file = Path(importlib.import_module(name).__file__).resolve()
    assert file.is_relative_to(home), f"{name} comes from {file}"
    print(name)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy so that the repository holds no build folder whose leftovers could enter it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds the wheel and sees the dependencies of this one.

    They are seen through a .pth file that adds this environment's folder of packages. The .pth files in that folder
    are not read then, so an editable installation of the repository stays out of sight.
    """
    home = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    python = home / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=home.parent)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"dso-{dso.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, info}
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert f"{info}/licenses/LICENSE" in names
    kinds = ("*.py", "*.csv", "*.html", "*.yaml", "*.json", "*.jsonl", "*.safetensors", "*.sh")
    files = (path for package in PACKAGES for kind in kinds for path in (ROOT / package).rglob(kind))
    shipped = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if not name.startswith(info)} >= shipped
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_every_module_imports_from_the_wheel_outside_the_repository(clean: Path, tmp_path: Path) -> None:
    printed = run(clean / "bin" / "python", "-c", IMPORT_ALL, *PACKAGES, cwd=tmp_path).split()
    expected = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py"
    }
    assert expected <= set(printed)


def test_the_installed_command_and_the_installed_configs_are_found(clean: Path, tmp_path: Path) -> None:
    assert run(clean / "bin" / "dso", "--help", cwd=tmp_path).startswith("usage: dso")
    code = "from launch.config.schema import *; print(*known_configs()); load_config('smollm2-roles')"
    shipped = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert run(clean / "bin" / "python", "-c", code, cwd=tmp_path).split() == shipped


def test_the_base_dependencies_are_those_of_the_core() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {requirement.split(">=")[0] for requirement in project["dependencies"]}
    assert names == {"accelerate", "gguf", "numpy", "safetensors", "torch", "transformers"}
    assert {"train", "distributed", "grpo", "test"} <= set(project["optional-dependencies"])


def test_every_public_name_of_the_core_resolves() -> None:
    for name in dso.__all__:
        assert getattr(dso, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dso.nonsense  # noqa: B018
