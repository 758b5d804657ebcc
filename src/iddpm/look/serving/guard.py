"""Who may ask: no foreign web page, nobody without the token where there is one, and nothing that is too large."""

import hmac

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "[::1]")
LARGEST = 1 << 16  # bytes of a request
HEADERS = {"x-content-type-options": "nosniff", "x-frame-options": "DENY", "content-security-policy": "default-src 'none'"}


def guards(host: str, token: str) -> list[Middleware]:
    """The checks before every request. A name that leads here by DNS is none of `hosts`: against DNS rebinding."""
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, host] if host not in ("0.0.0.0", "::") else ["*"]),
        Middleware(Guard, token=token),
    ]


class Guard:
    """Refuses requests of other origins (CSRF), without the token, or with a body that is too large, in one sentence of JSON."""

    def __init__(self, app: ASGIApp, token: str = ""):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, taken = Headers(scope=scope), 0
        code, why = self._fault(headers)
        if code:
            await JSONResponse({"error": why}, code, HEADERS)(scope, receive, send)
            return

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= LARGEST else {"type": "http.disconnect"}

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
            await send(message)

        await self.app(scope, bounded, hardened)

    def _fault(self, headers: Headers) -> tuple[int, str]:
        origin, length = headers.get("origin", ""), headers.get("content-length", "0")
        if origin and origin.partition("://")[2] != headers.get("host"):
            return 403, f"requests of pages from {origin} are refused"
        if self.token and not hmac.compare_digest(headers.get("authorization", ""), f"Bearer {self.token}"):
            return 401, "send the header Authorization: Bearer TOKEN, with the token of this server"
        if not length.isdigit() or int(length) > LARGEST:
            return 413, f"a request has at most {LARGEST} bytes"
        return 0, ""


def is_local(host: str) -> bool:
    """Whether an address is of this machine alone."""
    return host in LOCAL or host == "::1"
