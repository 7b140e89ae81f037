"""A real server over the demo model, on a free port of this machine."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import uvicorn

from flashmoe.chat.llm import LLM
from flashmoe.engine.prefix_cache import PrefixCache
from flashmoe.engine.scheduler import Scheduler
from flashmoe.server.app import Limits, create_app
from flashmoe.server.service import Service

KEY = "sesame"


@dataclass
class Running:
    """Where the server listens, and what is behind it."""

    url: str
    service: Service

    def wait_until_idle(self, seconds: float = 20) -> None:
        """Until nothing runs or waits any more, and nothing is prepared for later."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            stats = self.service.scheduler.stats()
            if stats.running == stats.waiting == stats.expected == len(self.service._expecting) == 0:
                return
            time.sleep(0.02)
        raise AssertionError(f"still busy: {stats}")


@pytest.fixture(scope="module")
def server(demo_bundle: Path) -> Iterator[Running]:
    # An application and its routes refer to each other: the model of the module before would count as memory in use.
    gc.collect()
    with LLM(demo_bundle, memory="2GiB", context=2048, sequences=3, prefix_cache="32MiB") as llm:
        scheduler = Scheduler(
            llm.engine, prefix_cache=PrefixCache(32 << 20, llm.engine.identity), most_waiting=12
        )
        service = Service(llm, scheduler, "demo")
        listener = socket.create_server(("127.0.0.1", 0))
        app = create_app(service, Limits(KEY, body_nbytes=1 << 20))
        config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=5)
        web = uvicorn.Server(config)
        thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]}, daemon=True)
        service.start()
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        _wait_for(url)
        yield Running(url, service)
        web.should_exit = True
        thread.join(15)
        service.stop(0)
        assert not thread.is_alive()


def _wait_for(url: str) -> None:
    for _ in range(200):
        try:
            if httpx.get(url + "/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    raise AssertionError("the server did not start")
