"""What the page refuses to do, with the status and the code of the answer."""

from __future__ import annotations

from rft.errors import UserError


class Refusal(UserError):
    """A request that is not carried out. `code` is what programs read."""

    def __init__(self, problem: str, *, status: int, code: str, where: str = "", cure: str = "") -> None:
        self.status, self.code = status, code
        super().__init__(problem, where=where, cure=cure)
