"""The floors: a module imports only from lower floors, and on its own floor only inside its own folder.

Imports inside functions count; those under TYPE_CHECKING do not. A new module must be added to the table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    0: "rft rft.types rft.errors rft.progress rft.waits rft.calls rft.frames rft.plain rft.lookout rft.threads",
    1: "rft.data rft.chat rft.wire rft.sandbox rft.metrics rft.breakdown rft.files rft.live rft.supervise rft.tracking "
    "rft.percentiles rft.redaction rft.listener rft.figures rft.html rft.tables",
    2: "rft.envs rft.graders rft.bundle",
    3: "rft.config rft.grader_cases rft.grader_probes",
    4: "rft.engines rft.store rft.salvage rft.sift rft.checkpoints rft.budget rft.reuse "
    "rft.cluster.queue rft.cluster.allocation",
    5: "rft.rollout rft.speaker rft.episode rft.slots rft.shaping rft.trainers rft.watch rft.show rft.transcript "
    "rft.curves",
    6: "rft.collect rft.evaluate rft.sampling rft.pipeline rft.replay rft.demonstrations rft.lesson "
    "rft.doctor rft.baseline rft.plan",
    7: "rft.trainers.grpo rft.trainers.leader rft.trainers.warmup rft.compare rft.report rft.export rft.assembly "
    "rft.preflight rft.regrade",
    8: "rft.lifecycle rft.job rft.evaluation rft.ui rft.cluster rft.offline",
    9: "rft.server",
    10: "rft.cli",
    11: "rft.__main__",
}
TABLE = {name: floor for floor, names in FLOORS.items() for name in names.split()}
FOLDERS = {  # listed as a whole
    *("rft.config", "rft.envs", "rft.graders", "rft.engines", "rft.sandbox", "rft.trainers"),
    *("rft.cluster", "rft.doctor", "rft.baseline", "rft.plan", "rft.compare", "rft.report", "rft.ui", "rft.server"),
    *("rft.bundle", "rft.offline", "rft.cli"),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("rft", *(f"rft/{link}" for link in ("envs", "graders", "trainers")))
    for path in (ROOT / folder).rglob("*.py")
}


def place(module: str) -> tuple[int, str] | None:
    """The floor of a module and the folder it lives in; None when the table does not know it."""
    parts = module.split(".")
    folder = ".".join(parts[:2]) if ".".join(parts[:2]) in FOLDERS else "rft"
    floor = TABLE.get(module, TABLE.get(folder) if folder in FOLDERS else None)
    return None if floor is None else (floor, folder)


def imports(node: ast.AST) -> Iterator[str]:
    """Modules of rft that run-time code under `node` imports."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from (name for other in child.orelse for name in imports(ast.Module([other], [])))
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.split(".")[0] == "rft")
        elif isinstance(child, ast.ImportFrom) and child.level == 0 and (child.module or "").split(".")[0] == "rft":
            inner = [f"{child.module}.{alias.name}" for alias in child.names]
            yield from (name if name in MODULES else str(child.module) for name in inner)
        elif isinstance(child, ast.ImportFrom) and child.level > 0:
            yield "a relative import"
        else:
            yield from imports(child)


def violations(module: str, tree: ast.AST) -> list[str]:
    here = place(module)
    if here is None:
        return [f"{module} is missing from the table of floors"]
    wrong = []
    for name in imports(tree):
        there = place(name)
        if there is None:
            wrong.append(f"{module} imports {name}, which has no floor")
        elif there[0] > here[0] or (there[0] == here[0] and there[1] != here[1]):
            wrong.append(f"{module} (floor {here[0]}) imports {name} (floor {there[0]})")
    return wrong


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_only_from_lower_floors(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    assert violations(module, tree) == []


@pytest.mark.parametrize(
    ("module", "source", "num_wrong"),
    [
        ("rft.config", "from rft.errors import ConfigError", 0),
        ("rft.errors", "from rft.types import Item", 0),  # one floor, one folder
        ("rft.trainers.batch", "from rft.trainers.objective import loss", 0),
        ("rft.trainers.batch", "from rft import rollout", 1),  # one floor, two folders
        ("rft.types", "import rft.config", 1),
        ("rft.types", "def f():\n    from rft.job import run_job", 1),
        ("rft.types", "if TYPE_CHECKING:\n    from rft.job import Job\nelse:\n    import rft.cli", 1),
        ("rft.types", "from . import errors", 1),
        ("rft.novel", "", 1),
        ("rft.config", "import rft.novel", 1),
    ],
)
def test_the_rule_itself(module: str, source: str, num_wrong: int) -> None:
    assert len(violations(module, ast.parse(source))) == num_wrong


def test_every_folder_is_read() -> None:
    for name in ("rft.types", "rft.envs", "rft.envs.http", "rft.graders", "rft.trainers", "rft.engines"):
        assert name in MODULES
