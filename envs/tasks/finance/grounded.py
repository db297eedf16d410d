"""Shadow grade: 1 for a number with citations, none of it invented or missing. Follows reading.py.

The opposite of the share of inventions, because a shadow grade that falls is an alarm; and not 1 for silence.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.envs.tasks.finance.reading import answered, citations, is_invented_number, results, seen


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    texts, cited, number = results(sample), citations(sample), answered(sample, item)
    is_supported = number is not None and not is_invented_number(number, texts, item)
    return float(is_supported and bool(cited) and cited <= seen(texts))
