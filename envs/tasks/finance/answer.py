"""Shadow grade: 1 for the right number, whatever it was taken from. Follows reading.py."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.envs.tasks.finance.reading import answered, is_right


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    return float(is_right(answered(sample, item), item))
