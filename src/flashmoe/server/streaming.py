"""Server-sent events, and answers that end when their client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from flashmoe.errors import FlashmoeError

T = TypeVar("T")
Events = AsyncGenerator[bytes, None]

# Comments keep proxies and clients from giving up while a long prompt is processed.
_KEEP_ALIVE_SECONDS = 10.0
KEEP_ALIVE = b": keep-alive\n\n"


class ClientLeft(Exception):  # noqa: N818 - nothing is wrong, nobody is there any more
    """The client closed the connection before its answer was finished."""


def data(value: Any) -> bytes:
    """One event without a name."""
    return b"data: " + _json(value) + b"\n\n"


def named(value: dict[str, Any]) -> bytes:
    """One event named like its "type", as Anthropic and the Responses API have it."""
    name: str = value["type"]
    return b"event: " + name.encode() + b"\n" + data(value)


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, but cancel it when the client leaves.  Raises ClientLeft then."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def event_stream(events: Events, describe: Callable[[FlashmoeError], bytes]) -> StreamingResponse:
    """A response of server-sent events.

    Waits for the first event: what cannot begin is an error with a status of its own.  A later FlashmoeError becomes
    the event describe(error), and the stream ends.
    """
    first = await anext(events, b"")
    return StreamingResponse(
        _kept_alive(_guarded(first, events, describe)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def merged(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all sources as they come, each with its source's number; raises what the first one raises.

    A reader that is slow slows its sources down; closing this closes them.
    """
    items = asyncio.Queue[tuple[int, T] | FlashmoeError | None](64)

    async def follow(index: int) -> None:
        try:
            async with aclosing(sources[index]) as source:
                async for item in source:
                    await items.put((index, item))
            await items.put(None)
        except FlashmoeError as error:
            await items.put(error)

    tasks = [asyncio.create_task(follow(i)) for i in range(len(sources))]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, FlashmoeError):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _guarded(first: bytes, events: Events, describe: Callable[[FlashmoeError], bytes]) -> Events:
    try:
        yield first
        async for event in events:
            yield event
    except FlashmoeError as error:
        yield describe(error)
    finally:
        await events.aclose()


async def _kept_alive(events: Events) -> Events:
    """The same events, and comments while there are none."""
    following: asyncio.Future[bytes] | None = None
    try:
        while True:
            following = following or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({following}, timeout=_KEEP_ALIVE_SECONDS)
            if not done:
                yield KEEP_ALIVE
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            following = None
            yield event
    finally:
        if following is not None:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        await events.aclose()


async def _left(request: Request) -> None:
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            return


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
