"""The house: one import package with three linked folders, light imports, a wheel that holds everything."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("envs", "graders", "trainers")
HEAVY = (
    "torch transformers vllm peft accelerate numpy "
    "matplotlib bm25s simple_icd_10_cm docstring_parser gymnasium verifiers mcp httpx2 trl datasets jinja2 "
    "wandb tensorboard trackio"
)


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds rft in this checkout, as a user's script beside it does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_are_relative_links(name: str) -> None:
    link = ROOT / "rft" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (ROOT / name / "__init__.py").is_file()


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_refuse_the_wrong_name(name: str) -> None:
    result = python(f"import {name}")
    assert result.returncode != 0
    assert f"this folder is the package rft.{name}: `import rft.{name}`, not `import {name}`" in result.stderr


@pytest.mark.parametrize("module", ["rft", "rft.config", "rft.cli", "rft.server.app", "rft.ui.routes"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    result = python(f"import sys, {module}; print(*sorted(set({HEAVY.split()}) & set(sys.modules)))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dynamic"] == ["version"]
    assert project["scripts"] == {"rft": "rft.cli:main"}


def test_pinned_set_fits_the_requirements() -> None:
    """What pyproject.toml asks for is pinned, in a version it admits."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = [
        line
        for name in ("cpu", "warmup", "cluster", "dev")
        for line in (ROOT / f"constraints/{name}.txt").read_text().splitlines()
    ]
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pinned}
    assert len(pins) == len(pinned), "a package is pinned twice"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *extras["train"],
        *extras["cpu"],
        *extras["quickstart"],
        *extras["warmup"],
        *extras["games"],
        *extras["cluster"],
        *extras["dev"],
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert not {"torchvision", "torchaudio", "torchcodec"} & pins.keys()


SCRIPTS = sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable(name: str) -> None:
    assert os.access(ROOT / "scripts" / name, os.X_OK)


@pytest.mark.slow
def test_wheel_holds_the_linked_folders(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    source = tmp_path / "source"  # setuptools writes build/ beside the sources: not into the checkout
    names = ("rft", *FOLDERS, "pyproject.toml", "LICENSE", "README.md")
    copy = ["cp", "-a", "--parents", *(name for name in names if (ROOT / name).exists()), str(source)]
    source.mkdir()
    subprocess.run(copy, cwd=ROOT, check=True, timeout=60)
    (source / "README.md").touch()
    subprocess.run([*command, str(source)], check=True, timeout=120)
    with zipfile.ZipFile(next(tmp_path.glob("rft_local-*.whl"))) as wheel:
        held = set(wheel.namelist())
    modules = [path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / "rft" / name).rglob("*.py")]
    assert {path.as_posix() for path in modules} <= held
    assert not any(name.split("/")[0] in FOLDERS for name in held), "loose top-level packages"
    assert "rft/cli/__init__.py" in held
    assert {"rft/templates/base.html", "rft/ui/static/index.html", "rft/ui/static/views/charts.js"} <= held
