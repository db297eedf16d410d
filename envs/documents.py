"""Local documents: a JSONL file or a folder of text files, read whole. What is wrong is a UserError that says where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.errors import DataError, UserError

_WHERE = "environment.documents"
_SUFFIXES = {".md", ".markdown", ".txt", ".rst"}
_CURE = 'write one JSON object a line: {"id": "...", "text": "...", "title": "..."}, title may be missing'


@dataclass(frozen=True, slots=True)
class Document:
    """One document; in a folder its id is its path there."""

    id: str
    text: str
    title: str = ""

    @property
    def whole(self) -> str:
        """What is searched."""
        return f"{self.title}\n{self.text}"


def load_documents(path: Path) -> dict[str, Document]:
    """All documents by id, in the file's order or that of the paths. Raises UserError."""
    if path.is_dir():
        documents = {document.id: document for document in _in_folder(path)}
    elif path.is_file():
        documents = _in_file(path)
    else:
        raise UserError(f"there is no file or folder {path}", where=_WHERE, cure="check the path")
    if not documents:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise UserError(f"{path} holds no documents", where=_WHERE, cure=f"add lines, or files that end in {kinds}")
    return documents


def _in_folder(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in inside.parts)
        if path.suffix.lower() in _SUFFIXES and not is_hidden and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(inside.as_posix().encode("utf-8", errors="replace").decode(), text)


def _in_file(path: Path) -> dict[str, Document]:
    documents: dict[str, Document] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                document = _document(line, f"{path}:{number}")
                if document.id in documents:
                    raise DataError(f"the id {document.id} appears twice", where=f"{path}:{number}", cure="rename one")
                documents[document.id] = document
    return documents


def _document(line: bytes, where: str) -> Document:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"is not JSON: {error}", where=where, cure=_CURE) from None
    if not isinstance(row, dict):
        raise DataError("is not a JSON object", where=where, cure=_CURE)
    return Document(_text(row, "id", where), _text(row, "text", where), _text(row, "title", where, default=""))


def _text(row: dict[str, Any], field: str, where: str, default: str | None = None) -> str:
    value = row.get(field, default)
    if field == "id" and isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or (field == "id" and not value):
        raise DataError(f"{field} must be text", where=where, cure=_CURE)
    return value.encode("utf-8", errors="replace").decode()  # half a surrogate pair could be searched by nothing
