"""The smallest change of a config or a cluster that makes a plan fit.

Changes are tried alone and together, in the order of what they cost together: first what changes no result
(a smaller micro-batch, activations computed twice, weights spread over the ranks), then what limits rollouts, more
GPUs, and last what trains something else (bfloat16, adapters). A value is then moved back as far as it still fits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from rft.plan.setup import Lora, Setup
from rft.plan.split import Ask, fits, why_not

_MIN_TOKENS = 512  # of a micro-batch: below it a GPU waits for its kernels
_MAX_GPUS = 1024
_DOUBLING = 4  # what twice as many GPUs cost; all ten of them stay below what trains something else
_RANK, _ALPHA = 16, 32
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25)  # away from engine.gpu_memory_share


@dataclass(frozen=True, slots=True)
class Change:
    """`overrides` of the config, as the command line takes them, and `flags` of `rft plan`."""

    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Lever:
    """One thing that can be changed. values: what it can be set to, the mildest first; `told` says a value.

    is_one_way: the last value is the one that fits if any does; else all are tried.
    """

    cost: int
    values: Callable[[Ask], Sequence[object]]
    apply: Callable[[Ask, object], Ask]
    told: Callable[[Ask, object], Change]
    is_one_way: bool = True


_Chosen = Sequence[tuple[_Lever, Sequence[object]]]


def smallest_change(ask: Ask) -> tuple[Change, Ask] | None:
    """The cheapest combination that makes an ask fit, and the ask with it; None where nothing here does.

    A larger cluster costs more with every doubling, so that it is no way around a smaller micro-batch.
    """
    possible = [(lever, values) for lever in _LEVERS if (values := lever.values(ask))]
    subsets = [found for size in range(len(possible) + 1) for found in combinations(possible, size)]
    sizes = _GROWTH.values(ask)
    best: tuple[int, _Chosen, list[object]] | None = None
    for subset in sorted(subsets, key=_cost):
        if best is not None and _cost(subset) >= best[0]:
            break
        if _settings(ask, (*subset, (_GROWTH, sizes[-1:]))) is None and _settings(ask, subset) is None:
            continue
        for doublings, grown in enumerate(((), *([(_GROWTH, [size])] for size in sizes))):
            cost = _cost(subset) + (_GROWTH.cost + _DOUBLING * doublings if grown else 0)
            chosen = (*subset, *grown)
            if chosen and (best is None or cost < best[0]) and (settings := _settings(ask, chosen)) is not None:
                best = cost, chosen, settings
                break
    if best is None:
        return None
    levers, settings = [lever for lever, _ in best[1]], _moved_back(ask, best[1], best[2])
    return _told(ask, levers, settings), _applied(ask, levers, settings)


def _cost(chosen: _Chosen) -> int:
    return sum(lever.cost for lever, _ in chosen)


def _settings(ask: Ask, chosen: _Chosen) -> list[object] | None:
    """The first values that fit, of one-way levers their last; None where none do."""
    levers = [lever for lever, _ in chosen]
    tried = product(*(values[-1:] if lever.is_one_way else values for lever, values in chosen))
    return next((list(values) for values in tried if fits(_applied(ask, levers, values))), None)


def _moved_back(ask: Ask, chosen: _Chosen, settings: list[object]) -> list[object]:
    """Each value as mild as it can be for the whole to fit, one lever after the other."""
    levers = [lever for lever, _ in chosen]
    for index, (lever, values) in enumerate(chosen):
        for value in values if lever.is_one_way else ():
            settings[index] = value
            if fits(_applied(ask, levers, settings)):
                break
    return settings


def _applied(ask: Ask, levers: Sequence[_Lever], settings: Sequence[object]) -> Ask:
    for lever, value in zip(levers, settings, strict=True):
        ask = lever.apply(ask, value)
    return ask


def _told(ask: Ask, levers: Sequence[_Lever], settings: Sequence[object]) -> Change:
    found = [lever.told(ask, value) for lever, value in zip(levers, settings, strict=True)]
    overrides = tuple(text for change in found for text in change.overrides)
    return Change(overrides, tuple(text for change in found for text in change.flags))


# --- the levers ------------------------------------------------------------------------------------------------------


def _with(ask: Ask, **changes: object) -> Ask:
    return replace(ask, setup=replace(ask.setup, **changes))  # type: ignore[arg-type]  # by name


def _halves(value: int, least: int) -> list[int]:
    """Below `value`, each half of the one before, down to `least`, which is the last."""
    found: list[int] = []
    while value > least:
        value = max(least, value // 2)
        found.append(value)
    return found


def _budgets(ask: Ask) -> list[int]:
    return _halves(ask.setup.max_tokens, min(ask.setup.max_tokens, max(_MIN_TOKENS, ask.setup.max_model_len)))


def _lengths(ask: Ask) -> list[int]:
    """Never below what rollouts of the workload need, nor below one turn."""
    setup = ask.setup
    least = max(_MIN_TOKENS, setup.work.context, setup.max_tokens_per_turn + 1)
    return _halves(setup.max_model_len, min(setup.max_model_len, -(-least // 64) * 64))


def _shares(ask: Ask) -> list[float]:
    is_shared = ask.cluster.num_gpus == 1 or ask.trainer_gpus == ask.cluster.num_gpus
    if not is_shared:
        return []
    share = ask.setup.gpu_memory_share
    moved = [round(share + sign * step, 2) for step in _SHARES for sign in (-1, 1)]
    return [value for value in moved if 0.1 <= value <= 0.9]


def _splits(ask: Ask) -> list[int]:
    """GPUs of one engine: within a node, and what divides the heads. Perhaps of a cluster that has to grow for it."""
    sizes = [ask.setup.tensor_parallel * factor for factor in (2, 4, 8)]
    return [size for size in sizes if size <= ask.cluster.gpus_per_node and ask.setup.shape.num_heads % size == 0]


def _sizes(ask: Ask) -> list[int]:
    """Clusters of more GPUs of the same kind."""
    count = ask.cluster.num_gpus
    return [size for size in (count * 2**power for power in range(1, 11)) if size <= _MAX_GPUS]


def _grown(ask: Ask, value: object) -> Ask:
    count = int(str(value))
    trainers = ask.trainer_gpus and ask.trainer_gpus * count // ask.cluster.num_gpus
    launch = None if ask.launch == "single" else ask.launch
    return replace(ask, cluster=replace(ask.cluster, num_gpus=count), trainer_gpus=trainers, launch=launch)


def _told_grown(ask: Ask, value: object) -> Change:
    grown = _grown(ask, value)
    trainers = (f"--trainer-gpus {grown.trainer_gpus}",) if grown.trainer_gpus else ()
    return Change(flags=(f"--gpus {grown.cluster}", *trainers))


def _args(setup: Setup, size: object) -> str:
    """engine.args with the flag; one that was there is replaced."""
    kept: list[str] = []
    skips = False
    for word in setup.engine_args:
        if not skips and word.partition("=")[0] not in ("--tensor-parallel-size", "-tp"):
            kept.append(word)
        skips = not skips and word in ("--tensor-parallel-size", "-tp")
    return "engine.args=" + json.dumps([*kept, "--tensor-parallel-size", str(size)])


def _with_args(ask: Ask, size: object) -> Ask:
    return _with(ask, engine_args=tuple(json.loads(_args(ask.setup, size).partition("=")[2])))


def _with_adapters(ask: Ask, _: object) -> Ask:
    sync = "auto" if ask.setup.sync in ("reload", "transfer") else ask.setup.sync
    changes = {"has_float_masters": True, "has_frozen": False, "sync": sync}
    return _with(ask, lora=Lora(_RANK, None), **changes)


def _told_adapters(ask: Ask, _: object) -> Change:
    """With what must go with it, where the config validates."""
    setup = ask.setup
    more = {
        "model.master_dtype=null": not setup.has_float_masters,
        "model.freeze=[]": setup.has_frozen,
        "training.sync=auto": setup.sync in ("reload", "transfer") and not setup.shape.is_mixture,
        "training.sync=merged": setup.shape.is_mixture,
    }
    lora = f"model.lora={{rank: {_RANK}, alpha: {_ALPHA}}}"
    return Change((lora, *(text for text, is_needed in more.items() if is_needed)))


def _override(key: str) -> Callable[[Ask, object], Change]:
    return lambda _, value: Change((f"{key}={json.dumps(value)}",))


def _with_attention(ask: Ask, _: object) -> Ask:
    rank = _RANK if ask.setup.lora is None else ask.setup.lora.rank
    return _with(ask, lora=Lora(rank, _ATTENTION), sync="auto")


def _told_attention(ask: Ask, _: object) -> Change:
    sync = ("training.sync=auto",) if ask.setup.sync == "merged" else ()
    return Change((f"model.lora.targets={json.dumps(list(_ATTENTION))}", *sync))


_GROWTH = _Lever(20, _sizes, _grown, _told_grown)  # and _DOUBLING with each
_LEVERS = (
    _Lever(
        1,
        _shares,
        lambda ask, v: _with(ask, gpu_memory_share=v),
        _override("engine.gpu_memory_share"),
        is_one_way=False,
    ),
    _Lever(2, _budgets, lambda ask, v: _with(ask, max_tokens=v), _override("training.max_tokens_per_micro_batch")),
    _Lever(
        3,
        lambda ask: [] if ask.setup.has_checkpointing else [True],
        lambda ask, v: _with(ask, has_checkpointing=v),
        _override("training.gradient_checkpointing"),
    ),
    _Lever(4, _splits, _with_args, lambda ask, v: Change((_args(ask.setup, v),)), is_one_way=False),
    _Lever(
        5,
        lambda ask: ["fsdp2"] if ask.launch in ("ddp", "deepspeed") and not why_not(ask.setup, "fsdp2") else [],
        lambda ask, _: replace(ask, launch="fsdp2"),
        lambda _, v: Change(flags=(f"--launch {v}",)),
    ),
    _Lever(8, _lengths, lambda ask, v: _with(ask, max_model_len=v), _override("engine.max_model_len")),
    _Lever(
        70,
        lambda ask: ["bfloat16"] if ask.setup.value_bytes == 4 else [],
        lambda ask, _: _with(ask, value_bytes=2),
        _override("model.dtype"),
    ),
    _Lever(
        74,
        lambda ask: [True] if ask.setup.has_expert_adapters else [],
        _with_attention,
        _told_attention,
    ),
    _Lever(80, lambda ask: [True] if ask.setup.lora is None else [], _with_adapters, _told_adapters),
)
