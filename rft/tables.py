"""Tables and lines for a terminal: foreign text made harmless, boxes on a terminal, columns alone where it is piped."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rft.plain import plain

_PIPED_WIDTH = 240  # columns: where nobody looks, no cell is worth a fold


def new_console() -> Console:
    """For standard output; without colours where that is no terminal."""
    console = Console(highlight=False, soft_wrap=True)
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=_PIPED_WIDTH)


def new_table(*headings: str, left: Collection[str] = (), is_boxed: bool = True) -> Table:
    """Columns to the right, those of `left` to the left. Headings are foreign too."""
    table = Table() if is_boxed else Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(cell(heading), justify="left" if heading in left else "right")
    return table


def cell(value: object, style: str = "", max_chars: int | None = None) -> Text:
    """The value as text without control characters and without markup."""
    return Text(plain(str(value), keep="\n", max_chars=max_chars), style=style)
