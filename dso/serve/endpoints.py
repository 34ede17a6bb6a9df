"""What is behind each path: OpenAI's endpoints, ours, health, metrics and the page.

Starlette is imported where it is used, so that nobody else needs it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from dso.serve.answering import Answer
from dso.serve.asking import Asked, Limits, read_chat, read_completion
from dso.serve.deciding import decide, read_decision
from dso.serve.engine import Closed, Engine, Piece, QueueFull
from dso.serve.fields import ApiError, read_body
from dso.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CLOSING = "dso.closing"  # in a request's scope: what to close when it has ended, in whatever way
Pieces = AsyncGenerator[tuple[int, Piece], None]
GONE = 499  # what nginx writes down for a client that went away


class Endpoints:
    """The endpoints of one engine.

    Args:
        engine: writes the answers.
        limits: of one request.
        max_body: bytes of one request.
    """

    def __init__(self, engine: Engine, limits: Limits, max_body: int):
        self.engine = engine
        self.limits = limits
        self.max_body = max_body
        self.metrics = Metrics(engine)
        self._reading = asyncio.Lock()  # a tokenizer is for one thread at a time

    async def page(self, request: Request) -> Response:
        """The playground."""
        from starlette.responses import HTMLResponse

        facts = {"model": self.limits.model, "scale": self.limits.scale, "scales": self.limits.scales}
        facts |= {"maxTokens": self.limits.max_tokens, "chat": bool(self.engine.backbone.tokenizer.chat_template)}
        page = files("dso.serve").joinpath("page.html").read_text(encoding="utf-8")
        made = page.replace("{{facts}}", json.dumps(facts).replace("<", "\\u003c"))
        return HTMLResponse(made, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    async def health(self, request: Request) -> Response:
        """200 while requests are taken."""
        from starlette.responses import JSONResponse

        well = self.engine.alive
        return JSONResponse({"status": "ok" if well else "closing"}, 200 if well else 503)

    async def figures(self, request: Request) -> Response:
        """Prometheus' metrics."""
        from starlette.responses import Response

        text, kind = self.metrics.text()
        return Response(text, headers={"Content-Type": kind})

    async def models(self, request: Request) -> Response:
        """The one model."""
        from starlette.responses import JSONResponse

        own = {"id": self.limits.model, "object": "model", "created": 0, "owned_by": "dso"}
        return JSONResponse({"object": "list", "data": [own]})

    async def completions(self, request: Request) -> Response:
        """``/v1/completions``."""
        return await self._write(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """``/v1/chat/completions``."""
        return await self._write(request, read_chat)

    async def decide(self, request: Request) -> Response:
        """``/v1/dso/decide``."""
        from starlette.responses import JSONResponse

        decision, scales = read_decision(await self._body(request), self.limits)
        backbone, handle = self.engine.backbone, self.engine.handle
        try:
            future = self.engine.run(lambda: decide(backbone, handle, decision, scales))
        except (QueueFull, Closed) as error:
            raise refusal(error) from error
        made = await asyncio.wrap_future(future)
        return JSONResponse({"object": "dso.decision", "model": self.limits.model, "scales": made})

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON of a request, as long as it may be and no longer."""
        # A page of another origin may send forms and plain text to this machine unasked, but not this type.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError("the Content-Type must be application/json", 415)
        raw = bytearray()
        async for part in request.stream():
            raw += part
            if len(raw) > self.max_body:
                raise ApiError(f"the body has more than {self.max_body} bytes", 413, code="body_too_large")
        return read_body(bytes(raw))

    async def _write(self, request: Request, read: Callable[..., Asked]) -> Response:
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse, StreamingResponse

        begun = time.monotonic()
        body = await self._body(request)
        async with self._reading:
            asked = await run_in_threadpool(read, body, self.engine.backbone, self.limits)
        answer = Answer(asked, self.limits.model, self.engine.backbone.tokenizer)
        pieces = self._pieces(asked, begun)
        request.scope[CLOSING].push_async_callback(pieces.aclose)
        await anext(pieces)  # which enters the queue, or raises
        self.metrics.prompt.inc(answer.prompt_tokens)
        if asked.stream:
            return StreamingResponse(
                _events(answer, pieces), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        whole, gone = asyncio.ensure_future(_collect(answer, pieces)), asyncio.ensure_future(_gone(request))
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        left = not whole.done()
        for task in (whole, gone):
            task.cancel()
        await asyncio.gather(whole, gone, return_exceptions=True)
        if left:
            return JSONResponse({}, GONE)
        whole.result()
        return JSONResponse(answer.whole())

    async def _pieces(self, asked: Asked, begun: float) -> Pieces:
        """What the rows tell, until all have ended; first a piece of nothing, once they are in the queue.

        The rows are given up when nobody reads on.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece]]()

        def tell(number: int, piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, (number, piece))

        try:
            rows = self.engine.submit(asked.jobs, tell)
        except (QueueFull, Closed) as error:
            raise refusal(error) from error
        left, first, failed = len(rows), True, False
        try:
            yield 0, Piece()
            while left:
                number, piece = await queue.get()
                if piece.error is not None:
                    failed = True
                    raise refusal(piece.error)
                if first:
                    self.metrics.first.observe(time.monotonic() - begun)
                    first = False
                self.metrics.written.inc(len(piece.tokens))
                left -= piece.finish is not None
                yield number, piece
        finally:
            if left:
                self.engine.give_up(rows)
                if not failed:
                    self.metrics.left.inc()


def refusal(error: Exception) -> ApiError:
    """What a client hears of a request that the engine does not answer."""
    if isinstance(error, QueueFull):
        return ApiError("too many requests wait; try again later", 429, code="queue_full", kind="rate_limit_error")
    if isinstance(error, Closed):
        return ApiError("the server is shutting down", 503, code="shutting_down", kind="server_error")
    return ApiError("the model failed at this request; the server's log says why", 500, kind="server_error")


async def _collect(answer: Answer, pieces: Pieces) -> None:
    async for number, piece in pieces:
        answer.add(number, piece)


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(answer: Answer, pieces: Pieces) -> AsyncGenerator[str, None]:
    """The server-sent events of a stream."""
    try:
        async for number, piece in pieces:
            answer.add(number, piece)
            if (chunk := answer.chunk(number)) is not None:
                yield _event(chunk)
        if (chunk := answer.last_chunk()) is not None:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except ApiError as error:  # the status is out already
        yield _event(error.body)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
