"""JSON that can be written again: no NaN, no infinity, no half of a surrogate pair, all of which Python reads."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator


def sound(value: Any) -> Any:
    """The value itself; ValueError where its text could not be stored or sent."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("contains half of a surrogate pair") from None
    except (ValueError, RecursionError):
        raise ValueError("contains a number that is not finite, or is nested too deeply") from None
    return value


def cleaned(value: Any) -> Any:
    """The value with null and replacement characters in those places: what a server or a model said is shown anyway."""
    text = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(text, parse_constant=lambda _: None)


SoundJson = Annotated[Any, AfterValidator(sound)]
SoundObject = Annotated[dict[str, Any], AfterValidator(sound)]
SoundText = Annotated[str, AfterValidator(sound)]
