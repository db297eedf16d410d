"""A user's folder of filings as a corpus: text, Markdown and HTML files, their tables as lines of `LABEL YEAR: FIGURE`.

Figures stay as they are printed: "in millions" above a table is not multiplied in. A table is understood when a row of
years stands above rows with as many figures; any other row is kept as text. Questions of your own stand in
questions.jsonl of the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rft.envs.documents import Document
from rft.envs.tasks.finance.questions import Question
from rft.envs.tasks.finance.reading import numbers
from rft.errors import DataError, UserError

QUESTIONS = "questions.jsonl"
_HTML, _MARKDOWN = {".html", ".htm", ".xhtml"}, {".md", ".markdown"}
_SUFFIXES = {".txt", *_MARKDOWN, *_HTML}
_YEAR = re.compile(r"\b(?:19|20)\d\d\b")
_FIGURE = re.compile(r"\(?-?\$?-?\d[\d,]*(?:\.\d+)?\)?%?")
_MAX_HEADING_WORDS = 5  # of a column: "Year ended September 30, 2023"
_CURE = '{"question": "...", "answer": "$1.2 billion", "documents": ["ID"]}, one JSON object a line'

Row = list[str]  # the cells of a line; a line of text is one cell


def load_filings(folder: Path) -> list[Document]:
    """Every file of the folder and the folders in it, by id. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", where="--filings", cure="name the folder that holds the files")
    documents: dict[str, Document] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            document = _document(path, path.relative_to(folder))
            if document.id in documents:
                raise UserError(f"two files have the id {document.id}", where=str(path), cure="rename one of them")
            documents[document.id] = document
    if not documents:
        kinds = ", ".join(sorted(_SUFFIXES))
        raise UserError(f"{folder} holds no filings", where="--filings", cure=f"add files that end in {kinds}")
    return [*documents.values()]


def _document(path: Path, inside: Path) -> Document:
    text = path.read_text(encoding="utf-8", errors="replace")
    suffix = path.suffix.lower()
    rows = _html_rows(text) if suffix in _HTML else (_cells(line, suffix in _MARKDOWN) for line in text.splitlines())
    name = inside.with_suffix("").as_posix()
    title = " ".join(re.split(r"[_/\s]+", name)).encode("utf-8", errors="replace").decode()
    return Document(re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "document", "\n".join(_lines(rows)), title)


def _cells(line: str, is_markdown: bool) -> Row:
    """A line's cells: between pipes in Markdown, else between tabs or two spaces and more."""
    parts = line.strip().strip("|").split("|") if is_markdown and "|" in line else re.split(r"\t| {2,}", line.strip())
    return [" ".join(part.strip(" *").split()) for part in parts]


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    years: list[str] = []
    for row in rows:
        cells = _merged(row)
        if not cells or all(set(cell) <= set("-:=. ") for cell in cells):
            continue
        heading, figures = _years(cells), cells[1:]
        if heading:
            years = heading
            yield " | ".join(cells)
        elif years and len(figures) == len(years) and all(map(_FIGURE.fullmatch, figures)):
            label = cells[0].rstrip(" .:").replace(":", " -")
            yield from (f"{label} {year}: {_signed(figure)}" for year, figure in zip(years, figures, strict=True))
        else:
            years = [] if len(cells) == 1 and len(cells[0].split()) > _MAX_HEADING_WORDS else years
            yield " | ".join(cells)


def _merged(row: Row) -> Row:
    """The cells without empty ones, and "$", "%" and ")" back at their figures."""
    cells: Row = []
    for cell in row:
        if cells and (cell in ("%", ")", ")%") or cells[-1] in ("$", "$(")):
            cells[-1] += cell
        elif cell:
            cells.append(cell.replace("$ ", "$"))
    return cells


def _years(cells: Row) -> list[str]:
    """The years of the columns when the row heads a table; the first cell may be a title."""
    columns = cells if _YEAR.search(cells[0]) else cells[1:]
    found = [_YEAR.findall(cell) for cell in columns]
    is_short = all(len(cell.split()) <= _MAX_HEADING_WORDS for cell in columns)
    years = [years[0] for years in found if len(years) == 1]
    return years if is_short and len(cells) > 1 and len(years) == len(columns) == len(set(years)) else []


def _signed(figure: str) -> str:
    """Accountants write -5 as (5)."""
    plain = figure.strip("()").replace(")", "").replace("(", "")
    return f"-{plain}" if "(" in figure else plain


class _Reader(HTMLParser):
    """Rows of cells from tables, lines of text from everything else; scripts and styles are left out."""

    _BLOCKS = frozenset(
        ["article", "br", "div", "li", "p", "section", "table", "title", *(f"h{n}" for n in range(1, 7))]
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.rows: list[Row] = [[""]]
        self._num_hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style"):
            self._num_hidden += 1
        elif tag == "tr" or (tag in self._BLOCKS and len(self.rows[-1]) == 1):
            self.rows.append([""])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._num_hidden = max(0, self._num_hidden - 1)
        elif tag in ("tr", "table"):
            self.rows.append([""])

    def handle_data(self, data: str) -> None:
        if not self._num_hidden:
            self.rows[-1][-1] += data


def _html_rows(text: str) -> list[Row]:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return [[" ".join(cell.split()) for cell in row] for row in reader.rows]


# --- questions of the user ---


class _Own(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    answer: str
    documents: list[str] = Field(min_length=1)
    tolerance: float = Field(0.01, ge=0, lt=1)


def own_questions(path: Path, known: set[str]) -> list[Question]:
    """The filled lines of a questions file; none without the file. Raises DataError with file and line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = (_own(line, f"{path}:{number}", known) for number, line in enumerate(lines, 1) if line.strip())
    return [question for question in found if question is not None]


def _own(line: str, where: str, known: set[str]) -> Question | None:
    try:
        own = _Own.model_validate_json(line)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        field = ".".join(map(str, problem["loc"])) or "the line"
        raise DataError(f"{field}: {problem['msg']}", where=where, cure=_CURE) from None
    if not own.question:
        return None
    if missing := sorted(set(own.documents) - known):
        raise DataError(f"there is no document {missing[0]}", where=where, cure="take the ids of documents.jsonl")
    stated = numbers(own.answer)
    if len(stated) != 1:
        raise DataError(f"answer holds {len(stated)} numbers, not one", where=where, cure=_CURE)
    years = tuple(dict.fromkeys(int(year) for year in _YEAR.findall(own.question)))
    return Question(own.question, "own", tuple(own.documents), *stated[0], years, own.tolerance)


def template(documents: Iterable[Document]) -> list[dict[str, object]]:
    """A questions file to fill in, one line per document; lines without a question are skipped when it is read."""
    return [{"question": "", "answer": "", "documents": [document.id]} for document in documents]
