"""What a warm start brings: the first tokens after a start with and without the uses of an earlier run, in alternation.

Every start is a process of its own.  Cold or warm, it waits for the same time before the first token, as somebody who
types does; tokens are random, those of the earlier run others than those that are measured.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from flashmoe import env
from flashmoe.bench.process import run_module, serve
from flashmoe.bench.stream import observed
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.workbench import Workbench


@dataclass(frozen=True)
class WarmStartOptions:
    """One start.  idle_seconds: before the first token; usage_file: None is a cold start."""

    bundle: str
    memory_bytes: int | None
    tokens: int = 16
    idle_seconds: float = 0.0
    usage_file: str | None = None
    expert_slots: int | None = None
    seed: int = 1


def compare(
    options: WarmStartOptions, teach: int, repeats: int, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Runs of both kinds, alternating, after one that decodes `teach` tokens to have uses to go by."""
    with tempfile.TemporaryDirectory(prefix="flashmoe-bench-") as folder:
        taught = str(Path(folder, "taught"))
        note("the earlier run")
        run_module(
            "flashmoe.bench.warm_start",
            asdict(
                replace(options, tokens=teach, idle_seconds=0.0, usage_file=taught, seed=options.seed + 1)
            ),
        )
        runs = []
        for repeat in range(repeats):
            for kind in ("cold", "warm"):
                note(f"{kind}, {repeat + 1} of {repeats}")
                usage = None
                if kind == "warm":  # a copy: the run adds its own uses
                    usage = shutil.copy(taught, Path(folder, "usage"))
                wanted = asdict(replace(options, usage_file=None if usage is None else str(usage)))
                runs.append({"start": kind, **run_module("flashmoe.bench.warm_start", wanted)})
        return runs


def measure(options: WarmStartOptions) -> dict[str, Any]:
    """Start, wait, decode; JSON values."""
    began = time.perf_counter()
    engine_options = EngineOptions(
        options.memory_bytes,
        context=max(1024, options.tokens),
        expert_slots=options.expert_slots,
        usage_file=options.usage_file or "off",
    )
    with Engine.open(Path(options.bundle), engine_options) as engine:
        opened = time.perf_counter()
        time.sleep(options.idle_seconds)
        filled = sum(len(engine.cache.resident_experts(layer)) for layer in _layers(engine))
        bench, digest = Workbench(engine), xxhash.xxh3_64()
        vocab = engine._parts.model.config.vocab_size
        ids: list[int] = np.random.default_rng(options.seed).integers(0, vocab, options.tokens).tolist()
        engine.start()

        def work() -> None:
            for token in ids:
                digest.update(engine.feed([token]).data)

        report = observed(bench, work, len(ids))
        return report | {
            "open_seconds": opened - began,
            "slots": engine.plan.slots,
            "experts": engine.plan.experts,
            "filled_slots": filled,
            "memory_bytes": engine.plan.budget_nbytes,
            "peak_memory_bytes": env.peak_memory(),
            "logits_xxh3": digest.hexdigest(),
        }


def _layers(engine: Engine) -> list[int]:
    return [layer.layer for layer in engine.bundle.expert_layers]


if __name__ == "__main__":
    serve(lambda options: measure(WarmStartOptions(**options)))
