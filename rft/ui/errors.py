"""What the page answers instead of data: each is a mistake of who asks, with a status of its own."""

from __future__ import annotations

from rft.errors import UserError


class Missing(UserError):
    """There is no such run, rollout or text: 404."""
