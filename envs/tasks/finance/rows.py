"""The dataset of the finance task: all wording of its prompt, the split by document, the rows.

Deterministic: the same documents give the same rows in the same order. A document belongs to one split; a question
whose documents belong to several is in none.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

from rft.envs.documents import Document
from rft.envs.tasks.finance.facts import Fact, facts_of
from rft.envs.tasks.finance.questions import PHRASES, Question, compared, lookups, reckoned, reworded
from rft.types import Split

# The line is of a place that no document is of, and has the form of a search result.
SYSTEM_TEXT = "Search, then copy the line that answers, like [zz] Freedonia - Exports 2020: $5 billion."
# Worked calls, as turns of a conversation, about places that no document is of: SmolLM2-135M makes a valid call in 28%
# of its rollouts after one of them, in 70% after two.
EXAMPLES = {
    "What were the tax revenues of Atlantis in 1999?": "tax revenues of Atlantis in 1999",
    "What was the interest rate of Utopia in 2001?": "interest rate of Utopia in 2001",
}
SHARES: dict[Split, float] = {"test": 0.2, "validation": 0.1}  # of the documents; the rest is for training
MIN_DOCUMENTS = 3  # one for each split
NUM_ROWS: dict[Split, int] = {"train": 1200, "validation": 200, "test": 400}
# of 100 questions; what is reckoned from two figures is the harder stage
KINDS = {"lookup": 80, "reworded": 8, "reckoned": 8, "compare": 4}


def messages_for(question: str) -> list[dict[str, str]]:
    """What the model reads before it writes."""
    messages = [{"role": "system", "content": SYSTEM_TEXT}]
    for asked, query in EXAMPLES.items():
        call = json.dumps({"name": "search", "arguments": {"query": query}})
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": f"<tool_call>{call}</tool_call>"})
    return [*messages, {"role": "user", "content": question}]


def split_documents(names: Iterable[str]) -> dict[str, Split]:
    """Which split each document belongs to: by the hash of its id, so that new documents move few others."""
    order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    num_test, num_validation = (max(1, round(SHARES[split] * len(order))) for split in ("test", "validation"))
    splits: dict[str, Split] = {}
    for place, name in enumerate(order):
        is_test, is_validation = place < num_test, place < num_test + num_validation
        splits[name] = "test" if is_test else "validation" if is_validation else "train"
    return splits


def factbook_questions(documents: Sequence[Document]) -> list[Question]:
    """Questions of every split, in the shares of KINDS, no two of the same text."""
    facts = {document.id: [fact for fact in facts_of(document) if fact.label in PHRASES] for document in documents}
    splits = split_documents(facts)
    return [
        question
        for split, count in NUM_ROWS.items()
        for question in _drawn([found for name, found in facts.items() if splits[name] == split], count)
    ]


def _drawn(facts: list[list[Fact]], count: int) -> list[Question]:
    """So many questions of the documents of one split, shuffled: any first n are a fair sample."""
    pick = random.Random(0)
    together = [fact for found in facts for fact in found]
    pools = {
        "lookup": lookups(together),
        "reworded": reworded(together),
        "reckoned": [question for found in facts for question in reckoned(found)],
        "compare": compared(together, pick),
    }
    found = []
    for kind, pool in pools.items():
        found += pick.sample(pool, min(count * KINDS[kind] // 100, len(pool)))
    pick.shuffle(found)
    return found


def build_rows(
    questions: Iterable[Question], splits: dict[str, Split], tools: list[dict[str, Any]]
) -> dict[Split, list[dict[str, Any]]]:
    """The rows of the three splits, in the order of the questions. splits: of each document."""
    rows: dict[Split, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for question in questions:
        found = {splits[name] for name in question.documents}
        if len(found) == 1:
            rows[found.pop()].append(_row(question, tools))
    return rows


def _row(question: Question, tools: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "messages": messages_for(question.text),
        "tools": tools,
        "kind": question.kind,
        "documents": list(question.documents),
        "value": question.value,
        "unit": question.unit,
        "years": list(question.years),
        "tolerance": question.tolerance,
    }
