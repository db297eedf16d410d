"""The real thing: wheels for this machine, installed into an empty home without a network, and a step trained there.

Downloads about 1 GB from pip's index; skipped where there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from loopback import without_network
from test_job import a_tree

from rft.bundle.making import make, take_order
from rft.bundle.target import DEFAULT_GLIBC, parse_target

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder() -> Iterator[Path]:
    """Gigabytes, which pytest's own folders would keep."""
    with tempfile.TemporaryDirectory(prefix="rft-bundle-") as path:
        yield Path(path)


def _needs_an_index(folder: Path) -> None:
    if not metadata.version("torch").endswith("+cpu"):
        pytest.skip("pip knows no index with CPU builds of torch here: the one that is installed has CUDA")
    asked = ["download", "-q", "--retries=0", "--timeout=15", "--no-deps", "-d", str(folder), "annotated-doc==0.0.7"]
    said = subprocess.run([sys.executable, "-m", "pip", *asked], capture_output=True, text=True, timeout=120)
    if said.returncode != 0:
        pytest.skip(f"pip reaches no index: {said.stderr.strip()[-200:]}")


def test_a_real_bundle_installs_and_trains_without_a_network(folder: Path) -> None:
    _needs_an_index(folder / "probe")
    tree = a_tree(folder)
    target = parse_target("cpu", None, DEFAULT_GLIBC)
    make(take_order(folder / "bundle", target, [folder / "model"], [folder / "rows.jsonl"]), print)
    home = folder / "home"
    home.mkdir()

    def inside(*command: str, cwd: Path = home, limit_s: float) -> str:
        bare = {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "PYTHON": sys.executable}
        result = subprocess.run(
            without_network([*command]), capture_output=True, text=True, timeout=limit_s, env=bare, cwd=cwd
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    assert "install: rft is in" in inside("sh", str(folder / "bundle/install"), limit_s=900)
    there = home / "rft"
    tree |= {"model": {"path": "models/model", "lora": {"rank": 4}}, "data": {"train": "data/rows.jsonl"}}
    (there / "run.yaml").write_text(yaml.safe_dump(tree))
    assert "check-offline" in inside(".venv/bin/rft", "--help", cwd=there, limit_s=120)
    said = inside(".venv/bin/rft", "check-offline", "run.yaml", cwd=there, limit_s=600)
    assert "offline: the training ended well and nothing else was tried" in said
    assert not os.path.lexists(there / "runs")
