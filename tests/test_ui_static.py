"""The page's files: nothing in them can turn text into markup or code, and nothing is asked of another machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

STATIC = Path(__file__).resolve().parent.parent / "rft/ui/static"
SCRIPTS = sorted(STATIC.rglob("*.js"))
FORBIDDEN = [
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "createContextualFragment"),
    *("setHTMLUnsafe", "srcdoc", "eval(", "Function(", "importScripts", "WebSocket"),
]
KNOWN = {"http://www.w3.org/2000/svg"}  # a namespace, never asked for


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(STATIC)) for path in paths]


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_make_no_markup_out_of_text(path: Path) -> None:
    text = path.read_text()
    assert [word for word in FORBIDDEN if word in text] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=names(SCRIPTS))
def test_scripts_open_with_what_they_own_and_import_what_is_there(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("// ")
    imports = re.findall(r'(?:\} from |import\()"([^"]+)"', text)
    assert [name for name in imports if not (path.parent / name).is_file()] == []
    for names_, module in re.findall(r'import \{([^}]*)\} from "([^"]+)"', text):
        exported = (path.parent / module).read_text()
        for name in names_.split(","):
            wanted = name.split(" as ")[0].strip()
            assert re.search(rf"export (async )?(function|class|const) {wanted}\b", exported), f"{wanted} of {module}"
            used = name.split(" as ")[-1].strip()
            assert len(re.findall(rf"\b{used}\b", text)) > 1, f"{used} is imported and not used"


def test_nothing_comes_from_another_machine() -> None:
    for path in STATIC.rglob("*"):
        if path.is_file():
            found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"'`)]*", path.read_text()))
            assert found <= KNOWN | {name.removeprefix("http:") for name in KNOWN}, path


def test_the_first_page_names_files_that_are_there() -> None:
    text = (STATIC / "index.html").read_text()
    files = re.findall(r'(?:href|src)="/ui/static/([^"]+)"', text)
    assert len(files) > 3
    assert [name for name in files if not (STATIC / name).is_file()] == []
    assert "<script>" not in text and not re.search(r"\son\w+=|style=", text), "the policy forbids these"
