"""The same small world for every adapter: a counter that goes up by what it is told, and says where it stands."""

from __future__ import annotations

from rft.envs.tasks import Task, Tool


def count(by: int) -> str:
    """Count up.

    Args:
        by: how far
    """
    return str(by)


class Counter:
    """The counter as a class: one per rollout."""

    def __init__(self) -> None:
        self.value = 0

    def reset(self, **columns: object) -> str:
        """For TRL."""
        self.value = 0
        return "The counter is at 0."

    def count(self, by: int) -> str:
        """Count up.

        Args:
            by: how far
        """
        self.value += by
        return str(self.value)


class CounterTools:
    """The same for `type: functions`, where every public method is a tool."""

    def __init__(self) -> None:
        self._value = 0

    def count(self, by: int) -> str:
        """Count up.

        Args:
            by: how far
        """
        self._value += by
        return str(self._value)


TASK = Task(name="world", tools=(Tool(count),))
