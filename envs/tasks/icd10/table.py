"""The ICD-10-CM code table: every code with its official description and its place in the tree.

Comes from the package `simple-icd-10-cm` (CMS tables, public domain), or from a file written from it, which loads ten
times faster. Holds no inclusion terms: those are the questions of the task.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

_CODE = re.compile(r"[A-Z][0-9A-Z]{2}(?:\.[0-9A-Z]{1,4})?")


@dataclass(frozen=True)
class Table:
    """`descriptions` and `parents` by code, in the official order; parents of chapters are ""."""

    descriptions: dict[str, str]
    parents: dict[str, str]

    @cached_property
    def children(self) -> dict[str, list[str]]:
        children: dict[str, list[str]] = defaultdict(list)
        for code, parent in self.parents.items():
            children[parent].append(code)
        return dict(children)

    @cached_property
    def leaves(self) -> list[str]:
        """The codes that may be billed: they have no children."""
        return [code for code in self.descriptions if _CODE.fullmatch(code) and code not in self.children]

    def chapter(self, code: str) -> str:
        """The number of the chapter a code belongs to, e.g. "11" for K35.80."""
        while self.parents[code]:
            code = self.parents[code]
        return code

    def find(self, text: str) -> str | None:
        """The code that `text` writes, whatever its case, spaces and dot; None for an unknown one."""
        code = "".join(text.upper().split())
        if code in self.descriptions:
            return code
        bare = code.replace(".", "")
        dotted = f"{bare[:3]}.{bare[3:]}" if len(bare) > 3 else bare
        return dotted if dotted in self.descriptions else None

    def save(self, path: Path) -> None:
        rows = [[code, text, self.parents[code]] for code, text in self.descriptions.items()]
        path.write_text(json.dumps(rows, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def load_table(path: Path) -> Table:
    rows = json.loads(path.read_text(encoding="utf-8"))
    return Table({code: text for code, text, _ in rows}, {code: parent for code, _, parent in rows})


def official_table() -> Table:
    """The table as the package ships it; takes about two seconds."""
    import simple_icd_10_cm as source

    descriptions: dict[str, str] = {}
    parents: dict[str, str] = {}
    for code in source.get_all_codes(with_dots=True):
        parent = source.get_parent(code)
        # a few blocks consist of one category of the same name: that category's parent is the block's
        parents[code] = source.get_parent(code, prioritize_blocks=True) if parent == code else parent
        descriptions[code] = source.get_description(code)
    return Table(descriptions, parents)


def official_terms(table: Table) -> list[tuple[str, str]]:
    """(leaf code, inclusion term) pairs: terms that belong to one code and do not speak of other codes."""
    import simple_icd_10_cm as source

    owners: dict[str, list[str]] = defaultdict(list)
    for code in table.descriptions:
        for term in source.get_inclusion_term(code):
            owners[term.strip()].append(code)
    leaves = set(table.leaves)
    return [
        (codes[0], term)
        for term, codes in owners.items()
        if len(codes) == 1 and codes[0] in leaves and "classifiable" not in term
    ]
