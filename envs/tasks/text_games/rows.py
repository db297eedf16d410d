"""The dataset of the text games: which games are in which split, and all wording of the prompt.

The three splits are the package's own folds: other seeds, and for most games other words. `small` is two kinds of
Simon Says, longer in the test than in training; `full` is all eight games as the package sets them. Deterministic.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

from rft.types import Split

GameSet = Literal["small", "full"]

FIRST_SEED: dict[Split, int] = {"train": 0, "validation": 10_000, "test": 20_000}
NUM_ROWS: dict[Split, int] = {"train": 480, "validation": 96, "test": 192}
FULL = ("arithmetic", "coin", "cookingworld", "mapreader", "peckingorder", "simonsays", "sorting", "twc")
_LENGTHS: dict[Split, tuple[int, ...]] = {"train": (3, 4), "validation": (4,), "test": (5,)}

# Worked calls, as turns: without one a small model never calls a tool. Two show how to go on where the game only says
# "Correct!"; where it says the next move, two would make all rollouts of a game alike. Their things are in no game.
EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "simonsays": (("Simon says, 'kick melon'.", "kick melon"),),
    "from memory": (
        ("Simon says, take these actions in order: kick melon, fry leek.", "kick melon"),
        ("Correct!", "fry leek"),
    ),
    "any": (("You are in the attic. You see a lamp.", "look around"),),
}


def settings(game_set: GameSet, split: Split) -> list[dict[str, str]]:
    """The kinds of games of a split, as options of `TextGame.reset`; rows take turns among them."""
    if game_set == "full":
        return [{"gameName": name, "gameParams": ""} for name in FULL]
    kinds = ("memorization=0", "memorization=1,verbose=1")
    return [
        {"gameName": "simonsays", "gameParams": f"gameLength={length},numDistractors=2,{kind}"}
        for length in _LENGTHS[split]
        for kind in kinds
    ]


def build_rows(game_set: GameSet, split: Split, task_of: Callable[[int, dict[str, str]], str]) -> list[dict[str, Any]]:
    """The rows of a split. task_of: what the game of a seed and options tells its player to do."""
    kinds, first = settings(game_set, split), FIRST_SEED[split]
    seeds = range(first, first + NUM_ROWS[split])
    return [
        _row(seed, options, task_of(seed, options)) for seed, options in zip(seeds, kinds * len(seeds), strict=False)
    ]


def _row(seed: int, options: dict[str, str], task: str) -> dict[str, Any]:
    """What the world says first is added to the last message when a rollout opens it."""
    name = "from memory" if "memorization=1" in options["gameParams"] else options["gameName"]
    messages = [{"role": "system", "content": f"{task} Game {seed}."}]
    for said, action in EXAMPLES.get(name, EXAMPLES["any"]):
        call = json.dumps({"name": "step", "arguments": {"action": action}})
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": f"<tool_call>{call}</tool_call>"})
    messages.append({"role": "user", "content": ""})
    return {"messages": messages, "seed": seed, "options": options}
