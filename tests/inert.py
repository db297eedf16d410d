"""Whether an HTML file can do anything: for pages that show what models and tools wrote."""

from __future__ import annotations

from html.parser import HTMLParser

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\"' onmouseover=\"alert(3)\" <a href='javascript:alert(4)'>"
    "</style></title></pre><iframe src=//evil.test></iframe>{{ 7 * 7 }} $\\frac{ & ]]> -->"
    " \x1b[2J\x1b]0;owned\x07 \u202eright to left"
    "\u2066 \x00 \ud800 end"
)
# a link is judged by where it leads
_ACTIVE = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "audio", "video", "foreignobject"}
_HARMLESS_CONTROLS = "\n\t"


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _ACTIVE:
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            if name.startswith("on"):
                self.found.append(f"{tag} {name}")
            if name in ("src", "href", "xlink:href", "action", "data") and not str(value).startswith("#"):
                self.found.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def dangers(html: str) -> list[str]:
    """What in the page could run, load or hide something; [] when it is inert."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    hidden = sorted({letter for letter in html if not letter.isprintable() and letter not in _HARMLESS_CONTROLS})
    return reader.found + [f"control character {letter!a}" for letter in hidden]


def text_of(html: str) -> str:
    """What a reader of the page sees."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    return " ".join(reader.text)
