"""The server: an ASGI application around an engine, and how it is run until it is told to stop.

app = make_app(engine, limits, key=None)
run(app, bind("127.0.0.1", 8000))
"""

from __future__ import annotations

import hmac
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from dso.errors import UserError
from dso.serve.asking import Limits
from dso.serve.endpoints import CLOSING, Endpoints
from dso.serve.engine import Engine
from dso.serve.fields import ApiError
from dso.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

OPEN = ("/", "/health", "/metrics")  # that need no key
BODY = 1_000_000  # bytes
GRACE = 30  # seconds that answers have to end in when the server is told to stop


def make_app(engine: Engine, limits: Limits, *, key: str | None = None, max_body: int = BODY) -> Starlette:
    """The application of an engine, which it closes when it ends.

    Args:
        limits: of one request.
        key: that requests have to bring as ``Authorization: Bearer KEY``; None for none.
        max_body: bytes of one request.
    """
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.routing import Route

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        engine.close()

    own = Endpoints(engine, limits, max_body)
    routes = [
        Route("/", own.page),
        Route("/health", own.health),
        Route("/metrics", own.figures),
        Route("/v1/models", own.models),
        Route("/v1/completions", own.completions, methods=["POST"]),
        Route("/v1/chat/completions", own.chat, methods=["POST"]),
        Route("/v1/dso/decide", own.decide, methods=["POST"]),
    ]
    paths = frozenset(route.path for route in routes)
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Gate, metrics=own.metrics, paths=paths, key=key)],
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_http, Exception: _fail},
    )


class Gate:
    """What every request passes: it is counted, its key is checked, and what it opened is closed."""

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str], key: str | None):
        self.app = app
        self.metrics = metrics
        self.paths = paths
        self.key = key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = monotonic(), 500

        async def noting(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        path = scope["path"] if scope["path"] in self.paths else "other"
        try:
            async with AsyncExitStack() as closing:
                scope[CLOSING] = closing
                app = self.app if path in OPEN or self._known(scope) else _no_key
                await app(scope, receive, noting)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(monotonic() - begun)

    def _known(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self.key is None or hmac.compare_digest(given, f"Bearer {self.key}".encode())


async def _no_key(scope: Any, receive: Any, send: Any) -> None:
    error = ApiError("the API key is missing or wrong: send Authorization: Bearer KEY", 401, code="invalid_api_key")
    await _response(error)(scope, receive, send)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # it is registered for these
    return _response(error)


async def _refuse_http(request: Request, error: Exception) -> Response:
    from starlette.exceptions import HTTPException

    assert isinstance(error, HTTPException)  # it is registered for these
    asked = f"{request.method} {request.url.path[:80]}"
    return _response(ApiError(f"{asked}: {error.detail}", error.status_code, code="unknown_url"))


async def _fail(request: Request, error: Exception) -> Response:
    return _response(ApiError("the server failed at this request; its log says why", 500, kind="server_error"))


def _response(error: ApiError) -> Response:
    from starlette.responses import JSONResponse

    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.body, error.status, headers=headers)


def bind(host: str, port: int) -> socket.socket:
    """A socket of an address; nobody can connect before the server listens.

    Raises:
        UserError: if the address cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        raise UserError(f"cannot listen at {host}:{port}: {error.strerror}; try another --host or --port") from error
    return made


def run(app: Starlette, at: socket.socket, started: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; answers that are being written are finished first, for up to 30 seconds.

    Args:
        started: called once requests are taken and signals are heard.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more when it has ended
    with suppress(KeyboardInterrupt):  # likewise
        Server(config).run(sockets=[at])
