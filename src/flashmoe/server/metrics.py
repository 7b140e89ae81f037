"""Counters for Prometheus, read from the engine when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from flashmoe import env
from flashmoe.server.service import Service


def exposition(service: Service) -> tuple[bytes, str]:
    """(the text, its content type)."""
    registry = CollectorRegistry()
    registry.register(_Collector(service))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Any]:
        """All families."""
        yield from _requests(self._service)
        yield from _experts(self._service)
        yield GaugeMetricFamily("flashmoe_memory_bytes", "Memory of the process now", env.current_memory())
        yield GaugeMetricFamily("flashmoe_memory_peak_bytes", "Peak memory of the process", env.peak_memory())
        yield GaugeMetricFamily(
            "flashmoe_memory_budget_bytes", "The ceiling (--memory)", self._service.llm.plan.budget_nbytes
        )


def _requests(service: Service) -> Iterator[Any]:
    stats = service.scheduler.stats()
    yield GaugeMetricFamily("flashmoe_requests_running", "Answers being generated", stats.running)
    yield GaugeMetricFamily("flashmoe_requests_waiting", "Requests that wait for a place", stats.waiting)
    finished = CounterMetricFamily(
        "flashmoe_requests_finished", "Answers ended, by reason", labels=["reason"]
    )
    for reason in ("stop", "length", "cancelled", "error"):
        finished.add_metric([reason], stats.finished.get(reason, 0))
    yield finished
    tokens = CounterMetricFamily("flashmoe_tokens", "Tokens processed, by kind", labels=["kind"])
    for kind in ("prompt", "cached", "completion"):
        tokens.add_metric([kind], getattr(stats, f"{kind}_tokens"))
    yield tokens
    yield CounterMetricFamily("flashmoe_steps", "Passes over the weights", stats.steps)
    yield CounterMetricFamily("flashmoe_step_seconds", "Seconds spent in them", stats.step_seconds)


def _experts(service: Service) -> Iterator[Any]:
    stats = service.llm.cache_stats()
    lookups = CounterMetricFamily("flashmoe_expert_lookups", "Experts asked for", labels=["result"])
    lookups.add_metric(["hit"], stats.total.hits)
    lookups.add_metric(["miss"], stats.total.misses)
    yield lookups
    yield CounterMetricFamily("flashmoe_expert_read_bytes", "Bytes of experts read", stats.bytes_read)
    yield CounterMetricFamily(
        "flashmoe_expert_stall_seconds", "Seconds in which reads were waited for", stats.total.stall_seconds
    )
