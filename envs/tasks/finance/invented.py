"""Shadow grade, better when low: 1 for a number or a citation that came from nowhere. Follows reading.py."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.envs.tasks.finance.reading import answered, citations, is_invented_number, results, seen


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    texts = results(sample)
    is_invented = is_invented_number(answered(sample, item), texts, item)
    return float(is_invented or bool(citations(sample) - seen(texts)))
