"""Text games of somebody else, the package textworld-express, as an environment: game.py is all that it took.

In a config: `environment: {type: gymnasium, env: "rft.envs.tasks.text_games:new_game"}`. scripts/prepare_text_games
writes the rows, whose `seed` and `options` choose the game.
"""

from __future__ import annotations

import shutil
from typing import Any

from rft.errors import UserError


def new_game(**kwargs: Any) -> Any:
    """A TextGame of game.py. Raises UserError naming what is not installed."""
    if shutil.which("java") is None:
        cure = "install a Java runtime, 8 or later (Debian: apt install default-jre-headless)"
        raise UserError("there is no java on the PATH", where="text_games", cure=cure)
    try:
        from rft.envs.tasks.text_games.game import TextGame
    except ImportError as error:
        cure = "pip install textworld-express==1.1.0 gymnasium"
        raise UserError(f"{error.name} is not installed", where="text_games", cure=cure) from None
    return TextGame(**kwargs)
