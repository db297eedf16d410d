"""Hostile text for a terminal: what a model or a tool wrote must not move the cursor, set titles or hide itself."""

from __future__ import annotations


def plain(text: str, *, keep: str = "", max_chars: int | None = None) -> str:
    r"""The text with every character that has no glyph (escapes, bidi marks, half surrogates) as its code, like \x1b.

    keep: characters that stay as they are, e.g. a newline. max_chars: what is longer is cut and ends with an ellipsis.
    """
    if max_chars is not None and len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter in keep else ascii(letter)[1:-1] for letter in text)
