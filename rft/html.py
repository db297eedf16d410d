"""Self-contained HTML files: templates of rft/templates, with everything foreign escaped and made harmless.

Every value that a template shows passes `plain` (no control characters, no marks that turn the direction) and the
HTML escape; only what `figure` made stays as it is. The pages need no script and forbid them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from rft.plain import plain

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_TEXT = 4_000  # characters of one value: nothing foreign makes a page large


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("rft"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _harmless(value: Any) -> Any:
    return value if hasattr(value, "__html__") else plain(str(value), keep="\n\t", max_chars=MAX_TEXT)


def render(template: str, **values: Any) -> str:
    """The page that a template of rft/templates makes of the values."""
    return _environment().get_template(template).render(**values)


def figure(element: str) -> Any:
    """An element that rft/figures.py made, to be shown as it is."""
    from markupsafe import Markup

    return Markup(element)
