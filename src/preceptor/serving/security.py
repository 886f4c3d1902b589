"""What every request must pass: its host, its origin, its token and its size; and the headers of every response."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")

# A response of the API is data and loads nothing. The pages have policies of their own (`preceptor.serving.pages`).
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware that refuses requests from other pages, without the token, or whose body is too large or stalls.

    Args:
        app: The application.
        token: Token of ``Authorization: Bearer TOKEN`` for paths below /v1; None asks for no token.
        most_bytes: Largest body.
        seconds: Longest time without any bytes of a body.

    A page of another origin cannot use a server without a token: browsers send the header Origin, and a name that is
    bound to 127.0.0.1 to get around that (DNS rebinding) is not among the hosts of this machine.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, most_bytes: int, seconds: float) -> None:
        self.app, self.token, self.most_bytes, self.seconds = app, token, most_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_headers(send)
        if refusal := self._refusal(scope["path"], Headers(scope=scope)):
            status, sentence = refusal
            await JSONResponse({"detail": sentence}, status)(scope, receive, send)
            return
        received, complete = 0, False

        # FastAPI passes on errors of this kind while it reads a body.
        async def limited() -> Message:
            nonlocal received, complete
            try:
                # After the body, the next message is the disconnection of a client, who may wait for long.
                async with asyncio.timeout(None if complete else self.seconds):
                    message = await receive()
            except TimeoutError:
                sentence = f"no data of the request arrived for {self.seconds:g} s; send it again"
                raise HTTPException(408, sentence, {"connection": "close"}) from None
            received, complete = received + len(message.get("body", b"")), not message.get("more_body", False)
            if received > self.most_bytes:
                raise HTTPException(413, self._too_large())
            return message

        await self.app(scope, limited, send)

    def _refusal(self, path: str, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.token is None and _name(host) not in LOOPBACK:
            return 400, "this server answers on 127.0.0.1 only; start it with a token to use it by another name"
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc != host:
            return (
                403,
                "pages of other sites cannot use this server; a proxy in front of it must pass on the header Host",
            )
        if self.token is not None and path.startswith("/v1"):
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return 401, "the token is missing or wrong; send Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_bytes:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self.most_bytes // 2**20} MiB"


def _name(host: str) -> str:
    """Return the name in a header Host: without the port and the brackets of IPv6."""
    return (_split(f"//{host}").hostname or "") if host.count("[") == host.count("]") <= 1 else ""


def _split(address: str) -> SplitResult:
    """Return the parts of an address; of one that is malformed, such as ``http://[foo]``, empty parts."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return wrapped
