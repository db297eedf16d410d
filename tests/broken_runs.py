"""Runs that are broken on purpose, each in one way, and what the doctor must say of them first.

`OVERLAYS` breaks configs/quickstart.yaml with the real model: `rft train configs/quickstart.yaml $(python
tests/broken_runs.py overlay NAME)`; for the dead tool `python tests/broken_runs.py serve` must run beside it. The tests
break runs of a tiny model, made by `tiny_tree`, in the same ways.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes import LoopbackServer, _write
from tiny import taught_model_folder, tiny_model_folder

Answer = tuple[int, dict[str, Any]]  # status and body
PORT = 8901  # of `serve`
CONSTANT = "def grade(sample, item):\n    return 0.5\n"
# meant to pay for an answer that holds a code; any code will do
HACKABLE = (
    "import re\n\ndef grade(sample, item):\n"
    '    return float(bool(re.search(r"\\b[A-Z]\\d[0-9A-Z]", sample["output_text"])))\n'
)
CAUSES = {  # name -> the check that must come first
    "dead_tool": "dead_tool",
    "constant_grader": "constant_grader",
    "learning_rate": "learning_rate",
    "hackable_grader": "reward_hacking",
}
_TOOLS = [
    {"name": name, "server_url": f"http://127.0.0.1:{PORT}/{name}", "max_attempts": 1}
    for name in ("search_codes", "lookup_code")
]
OVERLAYS: dict[str, list[str]] = {
    "dead_tool": ["environment.serve=null", f"environment.tools={json.dumps(_TOOLS)}"],
    "constant_grader": [f"grader.source={json.dumps(CONSTANT)}", "grader.name=constant"],
    "learning_rate": ["training.learning_rate=0.06"],
    "hackable_grader": [f"grader.source={json.dumps(HACKABLE)}", "grader.name=any_code"],
}


class FlakyServer(LoopbackServer):
    """Answers a share of the rollouts with 500, always; the others as `answer` says. `share` may be changed."""

    def __init__(self, share: float, answer: Callable[[dict[str, Any], str], Answer] | None = None) -> None:
        super().__init__()
        self.share, self._reply = share, answer or _echo

    async def _respond(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if zlib.crc32(body["trace_id"].encode()) % 100 < 100 * self.share:
            _write(writer, 500, {"error": "the database is gone"})
            return
        _write(writer, *await asyncio.to_thread(self._reply, body, self.paths[-1]))


def _echo(body: dict[str, Any], path: str) -> Answer:
    return 200, {"output": "nothing", "call_id": body["call_id"]}


# --- on a tiny model ---

LOOK = {"type": "function", "function": {"name": "look", "description": "look", "parameters": {"type": "object"}}}
TOOL_ROW = {"messages": [{"role": "user", "content": "go"}], "tools": [LOOK]}
CALL = '<tool_call>{"name": "look", "arguments": {}}</tool_call>'
VOWELS = "def grade(sample, item):\n    return min(1.0, sum(c in 'aeiou' for c in sample['output_text']) / 8)\n"
# meant to pay for a long answer in words: the letter e is easier
LETTERS = "def grade(sample, item):\n    return min(1.0, sample['output_text'].count('e') / 10)\n"
WORDS = "def grade(sample, item):\n    return min(1.0, len(set(sample['output_text'])) / 16)\n"


def tiny_tree(folder: Path, **sections: Any) -> dict[str, Any]:
    """A config without tools whose tiny model, all of it trained, learns within some steps."""
    model = folder / "model"
    if "model" not in sections:
        tiny_model_folder(model)
        write_rows(folder, [{"messages": [{"role": "user", "content": f"say {i}"}]} for i in range(32)])
    tree: dict[str, Any] = {
        "name": "broken",
        "runs_dir": str(folder / "runs"),
        "model": {"path": str(model), "dtype": "float32", "lora": None},
        "engine": {"type": "transformers", "max_model_len": 256, "max_concurrent": 64},
        "data": {"train": str(folder / "rows.jsonl")},
        "grader": {"type": "python", "source": VOWELS},
        "rollout": {"max_tokens_per_turn": 16, "temperature": 1.0},
        "training": {
            "steps": 6,
            "items_per_step": 6,
            "base_rollouts": 8,
            "learning_rate": 6e-3,
            "advantage_scale": "group",
            "checkpoint_every": 100,
        },
    }
    for name, section in sections.items():
        tree[name] = tree[name] | section if name in ("training", "rollout") else section
    return tree


def tool_model(path: Path) -> Path:
    """A tiny model that has learnt to call `look` once, and then to answer."""
    return taught_model_folder(path, TOOL_ROW, [CALL, "done"], [["nothing"]])


def tool_tree(folder: Path, model: Path, url: str, **sections: Any) -> dict[str, Any]:
    """A config of that model with `look` at `url`."""
    write_rows(folder, [TOOL_ROW | {"number": number} for number in range(32)])
    tools = [{"name": "look", "server_url": f"{url}/look", "max_attempts": 1}]
    changed = {
        "model": {"path": str(model), "dtype": "float32", "lora": None},
        "engine": {"type": "transformers", "max_model_len": 1024, "max_concurrent": 64},
        "environment": {"type": "http", "tools": tools},
        "rollout": {"max_tokens_per_turn": 80, "temperature": 0.7},
        "training": {"learning_rate": 1e-6, "steps": 3, "items_per_step": 4, "base_rollouts": 4},
    }
    return tiny_tree(folder, **changed | sections)


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- for a person with the real model ---


def _serve(share: float) -> None:
    """The ICD-10 tools behind a server that is dead for a share of the rollouts, until it is interrupted."""
    from rft.envs.serve import ToolServer

    with ToolServer("icd10") as tools:

        def ask(body: dict[str, Any], path: str) -> Answer:
            data = json.dumps(body).encode()
            request = urllib.request.Request(tools.base_url + path, data, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as refusal:
                return refusal.code, json.load(refusal)

        server = FlakyServer(share, ask)
        server.port = PORT
        with server:
            print(f"the tools answer at {server.base_url}, to {1 - share:.0%} of the rollouts; Ctrl-C ends it")
            server._thread.join()


if __name__ == "__main__":
    if sys.argv[1] == "overlay":
        print(" ".join(map(shlex.quote, OVERLAYS[sys.argv[2]])))
    else:
        _serve(0.3)
