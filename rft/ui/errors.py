"""What a route of the page refuses beyond a wrong value: a thing that is not there."""

from __future__ import annotations

from rft.errors import UserError


class Missing(UserError):
    """There is no such run, rollout or text: the page answers 404."""
