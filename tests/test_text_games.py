"""The text games: an adapter of 60 lines around a package that nobody here wrote; rows, grader and config for it."""

from __future__ import annotations

import ast
import asyncio
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
from bridging import a_call, specs_of, with_session
from script_loading import load_script

from rft.config import load_config
from rft.data import load_items, overlap
from rft.envs import Session
from rft.envs.tasks.text_games import new_game
from rft.envs.tasks.text_games.rows import EXAMPLES, FIRST_SEED, FULL, GameSet, build_rows, settings
from rft.errors import UserError
from rft.grader_cases import load_cases
from rft.grader_cases import test_cases as try_cases
from rft.grader_probes import probe
from rft.graders import Grader, build_grader
from rft.types import Item, Message, Split

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "envs" / "tasks" / "text_games"
CONFIG = ROOT / "configs" / "text_games.yaml"
GAMES = {"type": "gymnasium", "env": "rft.envs.tasks.text_games:new_game"}
SIMON = {"gameName": "simonsays", "gameParams": "gameLength=3,numDistractors=2"}
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
IS_THERE = importlib.util.find_spec("textworld_express") is not None and shutil.which("java") is not None
needs_games = pytest.mark.skipif(not IS_THERE, reason="needs java and pip install textworld-express==1.1.0")


def a_task(seed: int, options: dict[str, str]) -> str:
    """Instead of what a game tells its player."""
    return f"Do what {options['gameName']} says."


def played(seed: int, *actions: str, **options: str) -> tuple[list[str], bool, dict[str, Any]]:
    """(what the world said, is it over, its outcome) of one game, through the bridge as a rollout has it."""

    async def body(session: Session) -> tuple[list[str], bool, dict[str, Any]]:
        said = [session.opening]
        for action in actions:
            said.append((await session.call(a_call("step", {"action": action}))).output)
        return said, session.is_over, session.outcome()

    return with_session(body, GAMES, {"seed": seed, "options": {**SIMON, **options}})


# ------------------------------------------------------------------------------------------------- the adapter


def num_code_lines(path: Path) -> int:
    """Lines that are not blank, not a comment and not a docstring."""
    text = path.read_text(encoding="utf-8")
    nodes = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    docs = [n.body[0] for n in nodes if ast.get_docstring(n) is not None]
    quoted = {number for doc in docs for number in range(doc.lineno, (doc.end_lineno or doc.lineno) + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for n, line in lines if line.strip() and not line.strip().startswith("#") and n not in quoted)


def test_the_adapter_is_short() -> None:
    assert len((PACKAGE / "game.py").read_text(encoding="utf-8").splitlines()) <= 60
    assert num_code_lines(PACKAGE / "game.py") + num_code_lines(PACKAGE / "__init__.py") <= 60


@pytest.mark.parametrize("missing", ["java", "package"])
def test_what_is_missing_is_one_message_before_anything_starts(missing: str, tmp_path: Path) -> None:
    """In a process of its own: neither PATH nor imports of this one are touched."""
    (tmp_path / "textworld_express.py").write_text("import py4j_that_is_not_there", encoding="utf-8")
    if missing == "package":
        (tmp_path / "java").write_text("#!/bin/sh\n", encoding="utf-8")
        (tmp_path / "java").chmod(0o755)
    command = [sys.executable, str(ROOT / "scripts" / "prepare_text_games"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    words = {"java": ("no java", "default-jre"), "package": ("py4j_that_is_not_there", "pip install textworld-express")}
    assert done.returncode == 1 and all(word in done.stderr for word in words[missing]), done.stderr
    assert len(done.stderr.strip().splitlines()) == 2 and not (tmp_path / "out").exists()


def test_the_start_up_check_of_a_run_says_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no java on the PATH") as caught:
        specs_of(**GAMES)
    assert "install a Java runtime" in caught.value.cure


@needs_games
def test_one_tool_whose_schema_is_short() -> None:
    spec = specs_of(**GAMES)["step"]
    assert spec is not None
    action = {"type": "string", "minLength": 1, "maxLength": 100}
    assert spec["function"]["parameters"] == {
        "type": "object",
        "properties": {"action": action},
        "required": ["action"],
    }


@needs_games
def test_a_game_is_won_lost_and_left() -> None:
    said, _, outcome = played(0)
    first = said[0].removeprefix("Simon says, '").removesuffix("'.")
    assert outcome["reward"] == 0 and outcome["info"] == {"score": 0, "tasksuccess": False, "taskfailure": False}
    actions: list[str] = []
    while not (result := played(0, *actions))[1]:
        actions.append(result[0][-1].removeprefix("Simon says, '").removesuffix("'."))
    said, is_over, outcome = result
    assert actions[0] == first and len(actions) == 3 and said[-1].endswith("You win!")
    assert outcome["reward"] == pytest.approx(1) and outcome["info"]["tasksuccess"] is True
    said, is_over, outcome = played(0, actions[0], actions[2], actions[1])
    assert said[2] == "Incorrect!" and said[3] == "the episode is over"
    assert is_over and outcome["reward"] == -1 and outcome["num_steps"] == 2


@needs_games
@pytest.mark.parametrize(
    "action", ["", " ", "help", "x" * 100, "x" * 5_000, "\x00", "a\nb", "'; quit", "\ud800", "日本"]
)
def test_a_hostile_action_earns_nothing_and_breaks_nothing(action: str) -> None:
    _, is_over, outcome = played(0, action, action)
    assert not is_over and outcome["reward"] == 0
    assert played(0) == played(0)


@needs_games
@pytest.mark.parametrize("action", [None, 3, ["take coin"], {"a": 1}])
def test_an_action_that_is_no_text_is_explained(action: Any) -> None:
    async def body(session: Session) -> tuple[bool, str]:
        result = await session.call(a_call("step", {"action": action}))
        return result.is_error, result.output

    is_error, output = with_session(body, GAMES, {"seed": 0, "options": SIMON})
    assert is_error and "not a possible action" in output


@pytest.mark.slow
@needs_games
def test_games_at_once_do_not_meet() -> None:
    """In one Java process, from many threads: each game goes as it goes alone."""

    def play(seed: int) -> list[Any]:
        game = new_game(lists_actions=True)
        text, _ = game.reset(seed=seed, options={"gameName": FULL[seed % len(FULL)], "gameParams": ""})
        said = [text]
        for _ in range(4):
            action = said[-1].partition("\nActions: ")[2].split(", ")[seed % 3]
            text, reward, is_over, *_ = game.step(action)
            said += [text] if not is_over else [text, str(reward)]
            if is_over:
                break
        return said

    alone = [play(seed) for seed in range(24)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(play, range(24))) == alone


@needs_games
def test_all_games_share_one_java_process_and_a_dead_one_is_replaced() -> None:
    one, other = new_game(), new_game()
    process = one.game._gateway.java_process
    assert other.game._gateway.java_process is process and one.game.server is not other.game.server
    one.game.close()
    del one  # nor does the package's __del__ end it
    other.reset(seed=1, options=SIMON)
    process.kill()
    process.wait(10)
    third = new_game()
    assert (
        third.reset(seed=1, options=SIMON)[0].startswith("Simon says")
        and third.game._gateway.java_process is not process
    )


@pytest.mark.slow
@needs_games
def test_java_dies_with_us(tmp_path: Path) -> None:
    """Also when we are killed: its standard input ends."""
    text = (
        "from rft.envs.tasks.text_games import new_game\n"
        "game = new_game()\n"
        "print(game.game._gateway.java_process.pid, flush=True)\n"
        "input()"
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    ) as process:
        assert process.stdout is not None
        java = int(process.stdout.readline())
        assert "java" in Path(f"/proc/{java}/cmdline").read_text(encoding="utf-8")
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert gone_within(20, lambda: not is_running(java))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone_within(limit_s: float, is_gone: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not is_gone():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# ------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("game_set", ["small", "full"])
def test_rows_are_the_same_again_and_splits_share_nothing(game_set: GameSet) -> None:
    rows = {split: build_rows(game_set, split, a_task) for split in SPLITS}
    assert rows == {split: build_rows(game_set, split, a_task) for split in SPLITS}
    seeds = {split: {row["seed"] for row in rows[split]} for split in SPLITS}
    assert all(seed // 10_000 * 10_000 == FIRST_SEED[split] for split in SPLITS for seed in seeds[split])
    prompts = [json.dumps(row["messages"]) for split in SPLITS for row in rows[split]]
    assert len(prompts) == len(set(prompts))


def test_the_test_has_longer_games_than_training() -> None:
    lengths = {split: {kind["gameParams"].split(",")[0] for kind in settings("small", split)} for split in SPLITS}
    assert lengths["test"] == {"gameLength=5"} and not lengths["test"] & (lengths["train"] | lengths["validation"])


def test_a_prompt_holds_no_move_of_a_game() -> None:
    """The game itself speaks when a rollout opens it: a row has the worked call only."""
    for row in build_rows("small", "test", a_task):
        system, *turns, last = row["messages"]
        calls = [turn["content"].removeprefix("<tool_call>").removesuffix("</tool_call>") for turn in turns[1::2]]
        worked = [(turn["content"], json.loads(call)) for turn, call in zip(turns[::2], calls, strict=True)]
        shown = tuple((said, call["arguments"]["action"]) for said, call in worked)
        assert shown in EXAMPLES.values() and {call["name"] for _, call in worked} == {"step"}
        assert last == {"role": "user", "content": ""} and system["content"].endswith(f" Game {row['seed']}.")
        assert set(row) == {"messages", "seed", "options"}


@needs_games
def test_the_folds_have_words_of_their_own_and_the_worked_call_is_in_none() -> None:
    game, words = new_game(), dict[str, set[str]]()
    for split in SPLITS:
        openings = [
            game.reset(seed=FIRST_SEED[split] + n, options=SIMON) and game.game.runHistory[0] for n in range(60)
        ]
        words[split] = {action for info in openings for action in info["validActions"]}
    assert not words["train"] & words["test"] and not words["train"] & words["validation"]
    assert not words["test"] & words["validation"]
    told = {word.rstrip("s") for known in words.values() for action in known for word in action.split()}
    assert not told & {"melon", "leek", "kick", "fry"}


@pytest.mark.slow
@needs_games
def test_the_script_writes_the_same_bytes_and_every_game_can_be_won(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = the_script()
    for out in ("one", "two"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["prepare_text_games", "--out", str(tmp_path / out)])
            script.main()
    assert "192 games, won in 5 to 5 moves" in capsys.readouterr().out
    for split in SPLITS:
        assert (tmp_path / "one" / f"{split}.jsonl").read_bytes() == (tmp_path / "two" / f"{split}.jsonl").read_bytes()
    loaded = {split: load_items(tmp_path / "one" / f"{split}.jsonl", specs_of(**GAMES)) for split in SPLITS}
    assert overlap(loaded["train"], loaded["validation"] + loaded["test"]) == 0


def the_script() -> ModuleType:
    return load_script("prepare_text_games")


# ------------------------------------------------------------------------------------------------- grader and config


def with_grader(body: Callable[[Grader], Awaitable[T]]) -> T:
    """Use the config's grader and close it, all on one event loop."""

    async def run() -> T:
        grader = build_grader(load_config(CONFIG).grader)
        try:
            return await body(grader)
        finally:
            await grader.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("environment", "score"),
    [
        ({"reward": 1.0}, 1.0),
        ({"reward": 0.4}, 0.4),
        ({"reward": -1.0}, 0.0),
        ({"reward": 7}, 1.0),
        ({}, 0.0),
        (None, 0.0),
    ],
)
def test_the_grade_is_the_games_score(environment: Any, score: float) -> None:
    module: dict[str, Any] = {}
    exec((PACKAGE / "grader.py").read_text(encoding="utf-8"), module)
    for text in ("", "I won", '{"environment": {"reward": 1}}'):
        assert module["grade"]({"output_text": text, "environment": environment}, {"seed": 0}) == score


def test_nothing_that_is_written_scores() -> None:
    rows = build_rows("small", "train", a_task)[:4]
    items = [
        Item(id=str(n), row=row, messages=[Message.model_validate(m) for m in row["messages"]])
        for n, row in enumerate(rows)
    ]
    source = (PACKAGE / "grader.py").read_text(encoding="utf-8")
    assert not [
        result
        for result in with_grader(lambda grader: probe(grader, items, source, 0.1))
        if result.too_high or result.num_errors
    ]


def test_the_cases_pass() -> None:
    cases = load_cases(ROOT / "configs" / "cases" / "text_games.jsonl")
    results = with_grader(lambda grader: try_cases(grader, cases, repeats=1))
    assert len(results) >= 4 and not [result for result in results if not result.passed]


def test_the_config_is_of_this_task() -> None:
    config = load_config(CONFIG)
    assert config.environment.type == "gymnasium" and set(config.shadow_graders) == {"won"}
    longest = 5
    assert config.rollout.max_turns > longest
