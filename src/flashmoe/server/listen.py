"""Listening, and the orderly end: on a signal running answers finish, then connections close."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from flashmoe.errors import ConfigError
from flashmoe.server.service import Service

_BACKLOG = 256
_LAST_WORDS_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.  Raises ConfigError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error}): choose another --host or --port"
        ) from None
    return listener


def serve(app: Any, listener: socket.socket, service: Service, drain: int) -> None:
    """Serve until SIGINT or SIGTERM; then no request is accepted, and running ones have `drain` s to finish.

    What is not finished then is told so, and has a little time to hear it.
    """
    patience = drain + _LAST_WORDS_SECONDS
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_graceful_shutdown=patience, lifespan="off"
    )
    end = threading.Timer(drain, service.scheduler.close)
    end.daemon = True
    try:
        _Server(config, service, end).run(sockets=[listener])
    finally:
        end.cancel()
        if end.ident is not None:  # its thread holds the model, and must not outlive the interpreter
            end.join()


class _Server(uvicorn.Server):
    """end: started by the first signal, it ends what is not finished in time."""

    def __init__(self, config: uvicorn.Config, service: Service, end: threading.Timer) -> None:
        super().__init__(config)
        self._service, self._end = service, end

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, but the signal is not raised again afterwards: an orderly end is exit code 0."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal ends at once."""
        self._service.scheduler.refuse()
        super().handle_exit(sig, frame)
        if sig == signal.SIGTERM and self.should_exit and self._signalled:
            self.force_exit = True
        if not self._signalled:
            self._end.start()
        self._signalled = True

    _signalled = False
