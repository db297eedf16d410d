"""Which engine of a pool samples a rollout: prompts have an order of engines of their own, load decides within it.

Rendezvous hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam 2018): the rollouts of one prompt meet at one
engine and share its prefix cache, unless it is busier than the others. Load is what we have in flight there, what other
clients have, and once more what waits in its queue, so that a slow engine gets less. Costs one pass over the engines.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from math import ceil

from rft.engines.health import Member

_MAX_OVERLOAD = 1.25  # of the mean load; beyond it the next engine in the prompt's order is taken
_SWAMPED = 2.0  # of the mean load: a rollout leaves a home that is busier than this and has a queue
_MULTIPLIER, _64_BITS = 0x9E3779B97F4A7C15, (1 << 64) - 1  # multiplicative hashing (Knuth 1973)
_FULL_CACHE = 0.95  # contexts push each other out of the cache


def prompt_key(prompt_ids: Sequence[int]) -> int:
    """The same for the same prompt, in every process."""
    return int.from_bytes(blake2b(array("q", prompt_ids).tobytes(), digest_size=8).digest(), "big")


def choose(key: int, members: Sequence[Member]) -> Member:
    """The first of `members` (at least one), in the order of the prompt `key`, that has room."""
    roomy = [member for member in members if member.reported.kv_cache_use < _FULL_CACHE] or members
    loads = [member.load for member in roomy]
    bound = ceil(_MAX_OVERLOAD * (sum(loads) + 1) / len(loads))  # the least loaded one is within it
    fitting = (member for member, load in zip(roomy, loads, strict=True) if load < bound)
    return max(fitting, key=lambda member: (key ^ member.salt) * _MULTIPLIER & _64_BITS)


def is_swamped(home: Member, mean_load: float) -> bool:
    """Whether another engine reads the whole context again faster than `home` gets to a request."""
    return home.reported.num_waiting > 0 and home.load > _SWAMPED * mean_load
