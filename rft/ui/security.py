"""What keeps other web pages out, as plain ASGI around every request, so that streams stay streams.

Guarantees: every answer below /ui has the security headers, a failure's too; without keys only a browser that was
told a loopback address is answered (a foreign name that leads here is DNS rebinding); no other site's page can change
anything. Does not know who asks: keys are the server's.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rft.listener import is_loopback

CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:;"
    " font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class SecurityHeaders:
    """Adds the headers to every answer of the page; what has no answer because of a bug gets one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_of_page(scope["path"]):
            return await self._app(scope, receive, send)
        has_begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers["cache-control"] = "no-store" if is_of_api(scope["path"]) else "no-cache"
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:  # a bug: the server writes it down, its text may hold anything
            if not has_begun:
                text = "The server had an error while processing your request."
                await refusal(500, text, "server_error")(scope, receive, send_with_headers)
            raise
        return None


class OwnPagesOnly:
    """Refuses requests of other sites' pages that would change something. `everywhere`: not only below /ui/api."""

    def __init__(self, app: ASGIApp, *, everywhere: bool = False) -> None:
        self._app, self._everywhere = app, everywhere

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_meant = scope["type"] == "http" and scope["method"] not in _SAFE_METHODS
        if is_meant and (self._everywhere or is_of_api(scope["path"])):
            headers = Headers(scope=scope)
            if is_cross_site(headers):
                text = "This request comes from another site's page and is refused."
                return await refusal(403, text, "cross_site_request")(scope, receive, send)
            if is_of_api(scope["path"]) and not _is_json(headers):
                text = "Send the header content-type: application/json."
                return await refusal(415, text, "not_json")(scope, receive, send)
        return await self._app(scope, receive, send)


class LoopbackOnly:
    """Refuses requests that name another host than this machine: for servers without keys."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback(_host(Headers(scope=scope).get("host", ""))):
            text = "This server has no keys and answers at localhost, 127.0.0.1 and [::1] only."
            return await refusal(403, text, "host_not_allowed")(scope, receive, send)
        return await self._app(scope, receive, send)


def is_of_page(path: str) -> bool:
    return path in ("/", "/ui") or path.startswith("/ui/")


def is_of_api(path: str) -> bool:
    return path.startswith("/ui/api/")


def is_cross_site(headers: Headers) -> bool:
    """Whether a browser sends this for another origin's page; programs send neither header.

    Sec-Fetch-Site is the browser's own judgement, also behind a proxy; only older browsers leave it out.
    """
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()


def refusal(status: int, message: str, code: str, param: str | None = None) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": code, "param": param}}, status_code=status)


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


def _host(header: str) -> str:
    """The host of a Host header, without its port and without the brackets of an IPv6 address; "" for nonsense."""
    try:
        parts = urlsplit(f"//{header}")
        _ = parts.port  # raises where it is no number
    except ValueError:
        return ""
    is_plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    return (parts.hostname or "") if is_plain else ""
