"""Token ids as text, by a model's tokenizer.json: whole, or token by token so that the parts joined are the whole.

Needs the package `tokenizers`, and no torch. A few tokenizers stay loaded.
"""

from __future__ import annotations

import codecs
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.errors import UserError
from rft.store import RunStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MAX_LOADED = 2


class Tokenizers:
    """By path and time of change. Used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: OrderedDict[tuple[Path, int], Tokenizer] = OrderedDict()

    def of_run(self, store: RunStore, config: dict[str, Any]) -> Tokenizer:
        """The tokenizer of the run's model. Raises UserError when it cannot be loaded."""
        model = config.get("model")
        name = model.get("path") if isinstance(model, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError("the run's config names no model", where="model.path")
        files = [place / "tokenizer.json" for place in store.places(name)]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise UserError("there is no tokenizer.json", where=name, cure="bring back the model's folder")
        return self._load(file)

    def _load(self, file: Path) -> Tokenizer:
        key = (file.resolve(), file.stat().st_mtime_ns)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = _read(file)
            self._loaded.move_to_end(key)
            while len(self._loaded) > _MAX_LOADED:
                self._loaded.popitem(last=False)
            return self._loaded[key]


def _read(file: Path) -> Tokenizer:
    try:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file))
    except ImportError:
        raise UserError("the package tokenizers is not installed", cure="pip install tokenizers") from None
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"the tokenizer cannot be read: {error}", where=str(file)) from None


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The ids as text, special tokens too."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text


def texts_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """A text per id; joined they are `text_of`. A character made of several tokens belongs to the last of them."""
    from tokenizers.decoders import ByteLevel

    whole = text_of(tokenizer, ids)
    parts = _by_bytes(tokenizer, ids) if isinstance(tokenizer.decoder, ByteLevel) else _by_prefixes(tokenizer, ids)
    joined = "".join(parts)
    if joined == whole or not parts:
        return parts
    kept = len(joined) if whole.startswith(joined) else 0
    return [*(parts[:-1] if kept else [""] * (len(parts) - 1)), (parts[-1] if kept else "") + whole[kept:]]


def _by_bytes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """For byte-level tokenizers (GPT-2's and most since): a token is bytes, and they are decoded as they come."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [decoder.decode(_bytes_of(tokenizer.id_to_token(token_id))) for token_id in ids]
    if parts:
        parts[-1] += decoder.decode(b"", final=True)
    return parts


def _bytes_of(token: str | None) -> bytes:
    """None: an id that the tokenizer does not know, which decodes to nothing."""
    if token is None:
        return b""
    letters = _byte_of_letter()
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode("utf-8", "replace")


@cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for letters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _by_prefixes(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """For all others: what a token adds to the text of the few before it, held back while a character is incomplete."""
    parts: list[str] = []
    start = done = 0  # the context, and up to where it has been said
    for end in range(1, len(ids) + 1):
        before, now = text_of(tokenizer, ids[start:done]), text_of(tokenizer, ids[start:end])
        if now.endswith("\ufffd") and end < len(ids) and end - done < 4:
            parts.append("")
        else:
            parts.append(now[len(before) :])
            start, done = max(done - 4, 0) if done else 0, end
    return parts
