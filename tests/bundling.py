"""A project of five tiny packages that bundles and installs for real: wheels written by hand, no index needed."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from pathlib import Path

from rft.bundle.making import Order, take_order
from rft.bundle.target import DEFAULT_GLIBC, parse_target

ROOT = Path(__file__).resolve().parent.parent
PINS = {"alpha": "1.0", "torch": "2.13.0", "transformers": "5.17.0", "from-source": "0.3", "beta": "2.0.post1"}
TRANSFORMERS = "class AutoModelForCausalLM: ...\nclass LlamaForCausalLM: ...\n"
# A build backend without requirements, for the project itself (editable) and for what is published as source alone.
BACKEND = """
import pathlib, zipfile
NAME, VERSION = "{name}", "{version}"

def build_wheel(folder, settings=None, metadata=None):
    info, name = f"{{NAME}}-{{VERSION}}.dist-info", f"{{NAME}}-{{VERSION}}-py3-none-any.whl"
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        wheel.writestr(f"{{NAME}}.pth", str(pathlib.Path.cwd()) + chr(10))
        wheel.writestr(f"{{info}}/METADATA", f"Metadata-Version: 2.1\\nName: {{NAME}}\\nVersion: {{VERSION}}\\n")
        wheel.writestr(f"{{info}}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(f"{{info}}/RECORD", "")
    return name

build_editable = build_wheel
"""
PYPROJECT = (
    '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["{folder}"]\n'
    '[project]\nname = "{name}"\nversion = "{version}"\n'
)
DEPENDENCIES = """dependencies = ["alpha>=1"]
[project.optional-dependencies]
train = ["torch>=2", "transformers"]
cuda = ["rft-local[train]", "beta"]
graders = ["from-source"]
warmup = []
cluster = []
"""


def a_wheel(folder: Path, name: str, version: str, source: str = "", tag: str = "py3-none-any") -> Path:
    """A wheel with one module."""
    distribution = name.replace("-", "_")
    info = f"{distribution}-{version}.dist-info"
    files = {
        f"{distribution}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{distribution}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in [*files.items(), (f"{info}/RECORD", record)]:
            wheel.writestr(name, text)
    return path


def a_source(folder: Path, name: str, version: str) -> Path:
    """A package that is published as source alone."""
    stem = f"{name.replace('-', '_')}-{version}"
    files = {
        "pyproject.toml": PYPROJECT.format(name=name, version=version, folder="."),
        "backend.py": BACKEND.format(name=name.replace("-", "_"), version=version),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
    }
    with tarfile.open(folder / f"{stem}.tar.gz", "w:gz") as archive:
        for file, text in files.items():
            entry = tarfile.TarInfo(f"{stem}/{file}")
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return folder / f"{stem}.tar.gz"


def an_index(folder: Path) -> Path:
    """A folder for pip's find-links, with all that PINS asks for."""
    folder.mkdir(parents=True)
    a_wheel(folder, "alpha", "1.0")
    a_wheel(folder, "beta", "2.0.post1")
    a_wheel(folder, "torch", "2.13.0+cpu")
    a_wheel(folder, "torch", "2.13.0")  # the build for CUDA, which a bundle for CPUs must not take
    a_wheel(folder, "transformers", "5.17.0", TRANSFORMERS)
    a_source(folder, "from-source", "0.3")
    return folder


def a_project(root: Path, pins: dict[str, str] = PINS) -> Path:
    """A checkout in miniature with the real scripts/setup."""
    for name in ("rft", "envs", "scripts", "constraints"):
        (root / name).mkdir(parents=True)
    (root / "rft/__init__.py").write_text("")
    (root / "rft/config.py").write_text("")
    (root / "envs/__init__.py").write_text("")
    (root / "rft/envs").symlink_to("../envs")
    shutil.copy(ROOT / "scripts/setup", root / "scripts/setup")
    (root / "scripts/backend.py").write_text(BACKEND.format(name="rft_local", version="0.1"))
    (root / "pyproject.toml").write_text(
        PYPROJECT.format(name="rft-local", version="0.1", folder="scripts") + DEPENDENCIES
    )
    for name in ("cpu", "graders", "warmup", "cluster"):
        (root / f"constraints/{name}.txt").write_text("")
    (root / "constraints/cuda.txt").write_text("torch==2.13.0\n")
    (root / "constraints/cpu.txt").write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    return root


def a_model(folder: Path) -> Path:
    """A model folder as a hub's cache has them: the files are links."""
    folder.mkdir(parents=True)
    blob = folder.parent / f"{folder.name}-blob"
    blob.write_bytes(bytes(range(256)) * 40)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(blob)
    return folder


def an_order(tmp_path: Path, kind: str = "cpu", python: str | None = None, models: list[Path] | None = None) -> Order:
    """For `tmp_path/bundle`, from the project, model and data below tmp_path, which are made unless they are there."""
    root = tmp_path / "project"
    if not root.exists():
        a_project(root)
    if models is None:
        models = [tmp_path / "tiny"]
        if not models[0].exists():
            a_model(models[0])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    target = parse_target(kind, python, DEFAULT_GLIBC)
    return take_order(tmp_path / "bundle", target, models, [rows], root)
