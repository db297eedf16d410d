"""What is optimised: a number that the documents support, and the documents it stands in. Follows reading.py.

0.1 each for a result, for the right document among the results, for a number out of them, and for citing (F1); 0.6 for
the right number, of which 0.36 by the citations, paid only when the right document was shown and the number is not
invented. An invented number and an invented citation cost 0.1 each. So the right number alone is worth 0.54 at most,
and nothing without the tools.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.envs.tasks.finance.reading import (
        answered,
        citation_score,
        citations,
        is_invented_number,
        is_right,
        results,
        seen,
    )


def grade(sample: dict[str, Any], item: dict[str, Any]) -> float:
    texts, cited, number = results(sample), citations(sample), answered(sample, item)
    shown, gold = seen(texts), {str(name).casefold() for name in item["documents"]}
    citing = citation_score(cited, shown, gold)
    score = 0.1 * bool(shown) + 0.1 * bool(shown & gold) - 0.1 * bool(cited - shown)
    is_invented = is_invented_number(number, texts, item)
    score += 0.1 * citing - 0.1 * is_invented + 0.1 * (number is not None and bool(shown) and not is_invented)
    if is_right(number, item) and shown & gold and not is_invented:
        score += 0.24 + 0.36 * citing
    return max(0.0, score)
