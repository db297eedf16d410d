"""Shadow grade: F1 of the cited documents, of those that the tools had shown. Follows reading.py."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.envs.tasks.finance.reading import citation_score, citations, results, seen


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    gold = {str(name).casefold() for name in item["documents"]}
    return citation_score(citations(sample), seen(results(sample)), gold)
