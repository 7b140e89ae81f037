"""What `flashmoe plan` brings together: a model's sizes, a machine's rates, the forecast for each memory budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashmoe import env
from flashmoe.bench.machine_rates import (
    measure_drive,
    measure_memory,
    measure_products,
    scratch_file,
    scratch_records,
)
from flashmoe.bundle.reader import Bundle
from flashmoe.engine.forecast import SKEWED, UNIFORM, Machine, ModelWork, Speed, Work, decode, prefill
from flashmoe.engine.memory import MemoryPlan
from flashmoe.kernels.cpu import choose_isa
from flashmoe.kernels.kv_cache import CACHE_DTYPES
from flashmoe.models.registry import find_family


@dataclass(frozen=True)
class Given:
    """Rates that need no measurement, per second; None is measured."""

    drive: float | None = None
    memory: float | None = None
    products: float | None = None


def model_work(
    raw: Mapping[str, Any], facts: Mapping[str, Any], experts_per_token: int, kv_cache: str
) -> ModelWork:
    """The work of a token from a raw config.json and describe()'s facts."""
    family = find_family(raw)
    architecture, traffic = family.architecture(family.config(raw)), facts["traffic"]
    recurrence, attention = architecture.float_work()
    states = architecture.state_traffic()
    parts = {
        part: Work(traffic[f"{part}_nbytes"], traffic[f"{part}_products"])
        for part in ("dense", "shared", "head", "expert")
    }
    return ModelWork(
        layers=facts["layers"],
        expert_layers=facts["expert_layers"],
        experts=facts["experts"] if facts["expert_layers"] else 0,
        per_token=experts_per_token if facts["expert_layers"] else 0,
        record_nbytes=facts["record_nbytes"],
        dense=parts["dense"].plus(Work(states, 0, recurrence)),
        shared=parts["shared"],
        expert=parts["expert"],
        head=parts["head"],
        position=Work(architecture.position_nbytes(CACHE_DTYPES[kv_cache]), 0, attention),
    )


def measure_machine(
    path: Path,
    directory: Path | None,
    record_nbytes: int,
    threads: int | None,
    given: Given,
    pool_nbytes: int = 0,
) -> tuple[Machine, dict[str, Any]]:
    """The rates, and where each comes from (JSON values).

    The drive is measured on the records of the bundle `path`; on a scratch file in `directory` when one is named,
    or here when `path` is no bundle.  pool_nbytes: of the largest pool that is asked about.  Raises ConfigError or
    ReadError.
    """
    threads = threads or env.cpu_count()
    memory = given.memory or measure_memory(threads)
    products = given.products or measure_products(threads)
    batches, stream, fill, where = _drive(path, directory, record_nbytes, given.drive, pool_nbytes)
    facts = {
        "drive": {
            "source": where,
            "reads_together": [
                {"reads": reads, "seconds": seconds, "bytes_per_second": reads * record_nbytes / seconds}
                for reads, seconds in batches
                if seconds
            ],
            "bytes_per_second": stream,
            "fill_bytes_per_second": fill,
        },
        "memory_bytes_per_second": memory,
        "int8_products_per_second": products,
        "given": [name for name, rate in asdict(given).items() if rate],
        "threads": threads,
        "isa": choose_isa()[0],
    }
    return Machine(batches, stream, fill, memory, products), facts


def forecast(machine: Machine, work: ModelWork, plan: MemoryPlan, prompts: Sequence[int]) -> dict[str, Any]:
    """Decode at the begin and at the end of the context, and prompts; each from low to high (JSON values).

    prefill: into a pool that is filled, as in a conversation; first_prefill: into an empty one, after a start.
    """
    last = plan.context - 1
    fitting = [tokens for tokens in prompts if tokens < plan.context]
    chunk = plan.prefill_chunk
    return {
        "decode": _range([decode(machine, work, plan.slots, skew) for skew in (UNIFORM, SKEWED)]),
        "decode_full_context": _range(
            [decode(machine, work, plan.slots, skew, last) for skew in (UNIFORM, SKEWED)]
        ),
    } | {
        name: {
            str(tokens): _range(
                [
                    prefill(machine, work, plan.slots, skew, tokens, chunk, filled)
                    for skew in (UNIFORM, SKEWED)
                ]
            )
            for tokens in fitting
        }
        for name, filled in (("prefill", True), ("first_prefill", False))
    }


def _range(speeds: list[Speed]) -> dict[str, Any]:
    low, high = ({**asdict(speed), "bound_by": speed.bound_by} for speed in speeds)
    return {"low": low, "high": high}


def _drive(
    path: Path, directory: Path | None, record_nbytes: int, given: float | None, pool_nbytes: int
) -> tuple[tuple[tuple[int, float], ...], float, float, str]:
    """(batches, stream, fill, source)."""
    if given is not None or not record_nbytes:
        rate = given or float("inf")
        return ((1, record_nbytes / rate),), rate, rate, "given" if given else "not needed"
    with ExitStack() as stack:
        if directory is None and (path / "manifest.json").is_file():
            layers = Bundle.open(path).expert_layers
            files = [
                (path, layer.records(stripe))
                for layer in layers
                if layer.record_nbytes == record_nbytes
                for stripe, path in enumerate(layer.paths)
            ]
            source = f"records of {path}"
        else:
            directory = directory or Path()
            scratch = stack.enter_context(scratch_file(directory, record_nbytes))
            files = [(scratch, scratch_records(record_nbytes))]
            source = f"scratch file in {directory.resolve()}"
        rates = measure_drive(files, record_nbytes, pool_nbytes)
    return rates.batches, rates.stream, rates.fill, f"{source}, {rates.io} reads"
