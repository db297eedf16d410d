"""The lesson of a warm-up: which demonstrations are learnt, which only measure, which are left out.

Everything that can be wrong with the source is found here, before TRL or a model is loaded.
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass

from rft.chat import Chat
from rft.config import RunConfig, WarmupConfig
from rft.demonstrations import Demonstration, demonstrations_of_run, load_demonstrations
from rft.envs import discover_tools
from rft.errors import UserError
from rft.store import RunStore
from rft.types import Sequence

_NUM_NAMED = 5  # of the demonstrations that are left out


@dataclass(frozen=True, slots=True)
class Lesson:
    """The demonstrations that are trained on, and those that only measure."""

    learnt: list[Demonstration]
    held_out: list[Demonstration]
    too_long: list[Demonstration]  # left out

    @property
    def sequences(self) -> list[Sequence]:
        """What is trained on."""
        return [sequence for demonstration in self.learnt for sequence in demonstration.sequences]

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        num_tokens = sum(sum(sequence.mask) for sequence in self.sequences)
        size = f"{len(self.sequences):,} sequences, {num_tokens:,} tokens to learn"
        held = f"; {len(self.held_out):,} held out" if self.held_out else ""
        notes = [f"demonstrations: {len(self.learnt):,} ({size}){held}"]
        if self.too_long:
            names = ", ".join(demonstration.where for demonstration in self.too_long[:_NUM_NAMED])
            more = ", ..." if len(self.too_long) > _NUM_NAMED else ""
            notes.append(f"left out because they are too long: {len(self.too_long):,} ({names}{more})")
        return notes


def load_lesson(config: RunConfig, warmup: WarmupConfig, chat: Chat) -> Lesson:
    """What the config's one source has to teach. Raises DataError or UserError naming what is wrong with it."""
    if warmup.from_run is not None and warmup.min_grade is not None:
        found = demonstrations_of_run(RunStore.open(warmup.from_run), warmup.min_grade, chat)
    else:
        assert warmup.demonstrations is not None, "the config has exactly one source"
        # without an environment nothing is ever called: what the rows say of their tools is enough
        tools = asyncio.run(discover_tools(config.environment)) if config.environment is not None else None
        found = load_demonstrations(warmup.demonstrations, tools, chat)
    return plan_lesson(config, warmup, found)


def plan_lesson(config: RunConfig, warmup: WarmupConfig, demonstrations: list[Demonstration]) -> Lesson:
    """Leave out what is too long, hold out the asked share of the items. Raises UserError when nothing is left.

    Nothing is cut: a turn without its end would teach the model not to end.
    """
    limit = warmup.max_length or config.engine.max_model_len
    fitting = [demonstration for demonstration in demonstrations if demonstration.num_tokens <= limit]
    too_long = [demonstration for demonstration in demonstrations if demonstration.num_tokens > limit]
    item_ids = list(dict.fromkeys(demonstration.item_id for demonstration in fitting))
    random.Random(f"{config.seed}:held-out").shuffle(item_ids)
    num_held = math.ceil(warmup.held_out_share * len(item_ids))
    if len(item_ids) <= num_held:
        shortest = min(demonstration.num_tokens for demonstration in demonstrations)
        raise UserError(
            f"of {len(demonstrations)} demonstrations {len(fitting)} have at most {limit} tokens (the shortest has "
            f"{shortest}), and {num_held} are held out: none is left to learn from",
            where="warmup",
            cure="raise warmup.max_length and engine.max_model_len, or give more demonstrations",
        )
    held = set(item_ids[:num_held])
    learnt = [demonstration for demonstration in fitting if demonstration.item_id not in held]
    return Lesson(learnt, [demonstration for demonstration in fitting if demonstration.item_id in held], too_long)
