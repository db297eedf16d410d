"""The dataset of the kernels task: prompts, faults, the split by family, demonstrations.

`write` rows ask for a kernel by signature and sentence, without any code; `repair` rows show the naive version with one
fault, after one worked call about a kernel that is in no split. Whole families are held out: what is learnt must be
about loops, not about a kernel. Deterministic. In a language other than C there are write rows alone.
"""

from __future__ import annotations

import json
import random
from typing import Any

from rft.envs.tasks.kernels.catalog import Kernel, kernels
from rft.envs.tasks.kernels.languages.mojo import mojo_signature
from rft.types import Split

VALIDATION_FAMILIES = frozenset({"polynomial", "stencil", "rows", "extreme"})
TEST_FAMILIES = frozenset({"pair", "dot", "pool", "norm", "grid", "scan"})
SHOWN_FAMILIES = frozenset({"activation", "arithmetic", "sum"})  # of the training families; what a warm-up is shown
MAX_REPAIR_CHARS = 170  # of the code: a small model copies no more
MAX_SHOWN_CHARS = 150

SYSTEM_TEXT = "Call run with the whole {language} function. When it is correct, say done."
LANGUAGES = {"c": "C", "mojo": "Mojo"}  # as a row's key `language`, and as a prompt says it
WRITE = "Write {signature}: {sentence}."
REPAIR = "One thing is wrong here, correct it: {sentence}.\n{code}"
DONE = "done"
# One worked call, as turns of a conversation: with it an untrained small model calls the tool in two of three
# rollouts, without it in none.
EXAMPLE = "void fill(float *y, float s, int n) { for (int i = 0; i < n; i++) y[i] = s; }"
EXAMPLE_SENTENCE = "y[i] is s"

# name -> (what is replaced, by what): each makes every naive version wrong that it can be applied to (a test)
_FAULTS = {
    "ends early": ("i < n;", "i < n - 1;"),
    "ends late": ("i < n;", "i <= n;"),
    "starts late": ("int i = 0", "int i = 1"),
    "starts wrong": ("float s = 0", "float s = 1"),
    "does not add": ("s +=", "s ="),
    "one place": ("y[i] =", "y[0] ="),
}


def faulty(kernel: Kernel) -> dict[str, str]:
    """The naive version with one fault, by the fault's name."""
    found = {name: kernel.naive.replace(right, wrong, 1) for name, (right, wrong) in _FAULTS.items()}
    return {name: code for name, code in found.items() if code != kernel.naive}


def split_of(family: str) -> Split:
    if family in TEST_FAMILIES:
        return "test"
    return "validation" if family in VALIDATION_FAMILIES else "train"


def write_row(kernel: Kernel, tools: list[dict[str, Any]], language: str = "c") -> dict[str, Any]:
    keys = kernel.keys()
    signature = mojo_signature(keys) if language == "mojo" else kernel.signature
    question = WRITE.format(signature=signature, sentence=kernel.sentence)
    messages = [{"role": "system", "content": _system_text(language)}, {"role": "user", "content": question}]
    row = {"messages": messages, "tools": tools_for(language, tools), "stage": "write", **keys}
    return row if language == "c" else {**row, "language": language}


def _system_text(language: str) -> str:
    return SYSTEM_TEXT.format(language=LANGUAGES[language])


def tools_for(language: str, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The schemas, which speak of C code, with the name of the language."""
    text = json.dumps(tools).replace(" C code", f" {LANGUAGES[language]} code")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def repair_row(kernel: Kernel, fault: str, code: str, tools: list[dict[str, Any]]) -> dict[str, Any]:
    call = json.dumps({"name": "run", "arguments": {"code": EXAMPLE}})
    messages = [
        {"role": "system", "content": _system_text("c")},
        {"role": "user", "content": _repair(EXAMPLE_SENTENCE, EXAMPLE.replace(*_FAULTS["ends early"]))},
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
        {"role": "user", "content": _repair(kernel.sentence, code)},
    ]
    # with a second tool in the prompt a small model calls neither half as often; run says all that compile does
    run = [tool for tool in tools if tool["function"]["name"] == "run"]
    return {"messages": messages, "tools": run, "stage": "repair", "fault": fault, **kernel.keys()}


def _repair(sentence: str, code: str) -> str:
    return REPAIR.format(sentence=sentence, code=code)


def build_rows(tools: list[dict[str, Any]]) -> dict[str, dict[Split, list[dict[str, Any]]]]:
    """Rows by stage and split, shuffled: any first n of a split are a fair sample of it."""
    rows: dict[str, dict[Split, list[dict[str, Any]]]] = {
        stage: {"train": [], "validation": [], "test": []} for stage in ("write", "repair")
    }
    for kernel in kernels():
        split = split_of(kernel.family)
        rows["write"][split].append(write_row(kernel, tools))
        if len(kernel.naive) <= MAX_REPAIR_CHARS:
            found = faulty(kernel).items()
            rows["repair"][split] += [repair_row(kernel, fault, code, tools) for fault, code in found]
    for splits in rows.values():
        for split_rows in splits.values():
            random.Random(0).shuffle(split_rows)
    return rows


def build_write_rows(tools: list[dict[str, Any]], language: str) -> dict[Split, list[dict[str, Any]]]:
    """The write rows alone, in another language; the same kernels in the same order."""
    rows: dict[Split, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for kernel in kernels():
        rows[split_of(kernel.family)].append(write_row(kernel, tools, language))
    for split_rows in rows.values():
        random.Random(0).shuffle(split_rows)
    return rows


def demonstrations(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write rows of the shown training families that go on: the naive version is run, it is correct, done."""
    shown = [k for k in kernels() if k.family in SHOWN_FAMILIES and len(k.naive) <= MAX_SHOWN_CHARS]
    rows = [_demonstration(write_row(kernel, tools), kernel) for kernel in shown]
    random.Random(0).shuffle(rows)
    return rows


def _demonstration(row: dict[str, Any], kernel: Kernel) -> dict[str, Any]:
    call = {"name": "run", "arguments": json.dumps({"code": kernel.naive})}
    said = [
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_0", "type": "function", "function": call}]},
        {"role": "tool", "tool_call_id": "call_0", "content": "correct; 0.40 ms, naive 0.40 ms"},
        {"role": "assistant", "content": DONE},
    ]
    return {"messages": row["messages"] + said, "tools": row["tools"]}
