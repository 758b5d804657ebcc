"""Who may ask: no foreign web page, nobody without the token where there is one, and nothing that is too large."""

import hmac

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "[::1]")
LARGEST = 1 << 16  # bytes of a request, where pictures do not come with it
MOST = 1 << 28  # bytes of one that is too large that are still read, and thrown away, before it is told so
COOKIE = "iddpm_token"  # in which a browser keeps the token that it came with


def guards(host: str, token: str, largest: int = LARGEST, loads: str = "default-src 'none'") -> list[Middleware]:
    """The checks before every request. A name that leads here by DNS is none of `hosts`: against DNS rebinding.

    `largest`: bytes of a request; `loads`: what a page of ours may load (its Content-Security-Policy).
    """
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL, host] if host not in ("0.0.0.0", "::") else ["*"]),
        Middleware(Guard, token=token, largest=largest, loads=loads),
    ]


class Guard:
    """Refuses requests of other origins (CSRF), without the token, or with a body that is too large, in one sentence of JSON."""

    def __init__(self, app: ASGIApp, token: str, largest: int, loads: str):
        self.app, self.token, self.largest = app, token, largest
        self.headers = {
            "x-content-type-options": "nosniff", "x-frame-options": "DENY", "content-security-policy": loads,
            "referrer-policy": "no-referrer",
        }  # fmt: skip

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, taken = Request(scope), 0
        if self.token and request.method == "GET" and self._is_token(request.query_params.get("token", "")):
            # A browser's first visit: from here on its cookie brings the token, and the address no longer shows it.
            found = RedirectResponse(request.url.path, 303, self.headers)
            found.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            await found(scope, receive, send)
            return
        code, why = self._fault(request)
        if code == 413:  # who still sends would see a broken connection in the place of the answer
            while taken < MOST and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                taken += len(message["body"])
        if code:
            await JSONResponse({"error": why}, code, self.headers)(scope, receive, send)
            return

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            return message if taken <= self.largest else {"type": "http.disconnect"}

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in self.headers.items())]
            await send(message)

        await self.app(scope, bounded, hardened)

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def _fault(self, request: Request) -> tuple[int, str]:
        headers = request.headers
        origin, length = headers.get("origin", ""), headers.get("content-length", "0")
        brought = headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE, "")
        if origin and origin.partition("://")[2] != headers.get("host"):
            return 403, f"requests of pages from {origin} are refused"
        if self.token and not self._is_token(brought):
            return (
                401,
                "send the header Authorization: Bearer TOKEN, with the token of this server; a browser opens /?token=TOKEN",
            )
        if not length.isdigit() or int(length) > self.largest:
            return 413, f"a request has at most {self.largest} bytes"
        return 0, ""


def is_local(host: str) -> bool:
    """Whether an address is of this machine alone."""
    return host in LOCAL or host == "::1"
