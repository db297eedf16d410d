"""TextWorldExpress behind Gymnasium's interface. All games of a process share one Java process, which dies with it."""

from __future__ import annotations

import os
import threading
from functools import cache
from typing import Any

from gymnasium import Env, spaces
from textworld_express import TextWorldExpressEnv

_FOLDS = ("train", "dev", "test")  # of the package: seeds from 0, 10000 and 20000, most games with words of their own
_FACTS = ("score", "tasksuccess", "taskfailure")
_lock = threading.Lock()


@cache
def _java() -> TextWorldExpressEnv:
    os.environ.setdefault("JAVA_TOOL_OPTIONS", "-Xmx512m")  # by default it may take a quarter of the memory
    return TextWorldExpressEnv()


class _Game(TextWorldExpressEnv):  # type: ignore[misc]
    def __init__(self) -> None:
        """One more game in the Java process that is there: the package would start another."""
        with _lock:
            if _java()._gateway.java_process.poll() is not None:  # it died, with its games
                _java.cache_clear()
            self.__dict__.update(_java().__dict__)
        self.server = self._gateway.jvm.textworldexpress.runtime.PythonInterface()

    def close(self) -> None:
        """The package's would end the Java process, also from __del__."""


class TextGame(Env[str, str]):
    """`reset` takes the package's options {gameName, gameParams}; the seed says which fold the game is of."""

    action_space = spaces.Text(100, charset="".join(map(chr, range(32, 256))))
    observation_space = spaces.Text(10_000)

    def __init__(self, lists_actions: bool = False) -> None:
        self.game, self._lists_actions = _Game(), lists_actions

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        fold = _FOLDS[(seed or 0) // 10_000 % len(_FOLDS)]
        game = {"gameName": "simonsays", "gameParams": "", **(options or {})}
        _, info = self.game.reset(seed or 0, fold, **game)
        return self._text(info), {name: info[name] for name in _FACTS}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        _, reward, is_over, info = self.game.step(action)
        return self._text(info), reward, is_over, False, {name: info[name] for name in _FACTS}

    def _text(self, info: dict[str, Any]) -> str:
        listed = f"\nActions: {', '.join(sorted(info['validActions']))}" if self._lists_actions else ""
        return str(info["observation"]).strip() + listed
