"""Errors as the wire has them: a status and `{"error": {"message", "type", "param", "code"}}`.

Every failure that a client may see is an ApiError, raised where it is found and written once, in app.py. An error of
the user inside rft becomes one with `of_user_error`; anything else is a bug and answers 500 without its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft.errors import UserError

NO_RETRY = {"x-should-retry": "false"}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(Exception):
    """What a request is refused with. `param` is the path of the field that is wrong, `code` what programs read.

    `headers` of the answer tell the SDK not to repeat what would fail again; those given are added.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message, self.status, self.code, self.param = message, status, code, param
        self.headers = {**({} if status in (429, 503) else NO_RETRY), **(headers or {})}
        super().__init__(message)

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def not_found(kind: str, object_id: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """`kind` as a person says it: file, fine-tuning job, model."""
    return ApiError(f"No such {kind}: {object_id}", status=404, param=param, code=code or "not_found")


def of_user_error(error: UserError, *, code: str, param: str | None = None) -> ApiError:
    """The user's mistake with its cure; `where` is the field unless `param` names it."""
    cure = f" ({error.cure})" if error.cure else ""
    return ApiError(f"{error.problem}{cure}", code=code, param=param or error.where or None)
