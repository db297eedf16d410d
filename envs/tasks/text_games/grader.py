"""Grade of a text game: the game's own score, from 0 to 1; the text of this file is the `source` of a python grader.

Only the environment knows the score: nothing that the model writes can raise it.
"""

from typing import Any


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    score = (sample.get("environment") or {}).get("reward", 0.0)
    return min(max(float(score), 0.0), 1.0)
