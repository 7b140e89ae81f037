"""The experiments by name, and what each stands for; their code is imported when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from flashmoe.bench.experiments.base import Variant
from flashmoe.bench.experiments.compressed import PACKAGES
from flashmoe.engine.loading import Parts
from flashmoe.errors import ConfigError

_HERE = "flashmoe.bench.experiments."


@dataclass(frozen=True)
class Experiment:
    """One change of the engine; install: "module:function" of this package, called with the setting."""

    name: str
    stands_for: str
    install: str
    setting: str = ""
    codec: str | None = None  # of a compressed copy that it reads

    def missing(self) -> str | None:
        """Why it cannot run here, as far as that is known before; None: it can."""
        if self.codec is None or find_spec(PACKAGES[self.codec]) is not None:
            return None
        return f"needs the package {PACKAGES[self.codec]}: pip install 'flashmoe[experiments]'"

    def start(self, parts: Parts, scratch: Path | None) -> Variant:
        """Put it to work in an engine that has processed nothing.  Raises UnavailableError, ReadError, BudgetError."""
        module, function = self.install.split(":")
        begin: Callable[[Parts, str, Path | None], Variant] = getattr(import_module(_HERE + module), function)
        return begin(parts, self.setting, scratch)


EXPERIMENTS = (
    Experiment(
        "python-reader", "control: what reading with Python threads costs", "page_cache:install", "control"
    ),
    Experiment(
        "page-cache",
        "trust the OS: no pool, experts copied out of the page cache",
        "page_cache:install",
        "instead",
    ),
    Experiment(
        "page-cache-and-pool", "buffered reads under the pool, pages kept", "page_cache:install", "beside"
    ),
    Experiment("mmap", "experts mapped, pages faulted in by the kernels", "mapped:install", "faults"),
    Experiment("mmap-willneed", "the same, MADV_WILLNEED for a step's experts", "mapped:install", "willneed"),
    Experiment("mmap-populate", "the same, MADV_POPULATE_READ by 8 threads", "mapped:install", "populate"),
    Experiment("lz4", "records compressed with lz4", "compressed:install", "lz4", "lz4"),
    Experiment("zstd", "records compressed with zstd -3", "compressed:install", "zstd", "zstd"),
    Experiment("temporal", "read ahead what the previous token used", "prediction:install", "temporal"),
    Experiment("lookahead-off", "nothing is read ahead", "prediction:install", "off"),
    Experiment("lookahead-on", "always read ahead by the next router", "prediction:install", "on"),
    Experiment("uring", "one io_uring instead of a pool of threads in pread", "reads:install_uring"),
    Experiment("split", "gate_up and down as two reads", "reads:install_split"),
    *(
        Experiment(
            f"queue-depth-{depth}", f"at most {depth} reads at a time", "reads:install_depth", str(depth)
        )
        for depth in (1, 2, 4, 8, 16, 32)
    ),
    Experiment("small-pages", "the pool in pages of 4 KiB, not 2 MiB", "schedule:install_small_pages"),
    Experiment("serial", "read all misses, then compute", "schedule:install_serial"),
)


def choose(names: Sequence[str] | None) -> list[Experiment]:
    """The experiments of these names, in the catalog's order; a name like queue-depth stands for its family.

    None: all.  Raises ConfigError for a name that fits none.
    """
    if names is None:
        return list(EXPERIMENTS)
    chosen = set[str]()
    for name in names:
        exact = [one.name for one in EXPERIMENTS if one.name == name]
        family = exact or [one.name for one in EXPERIMENTS if one.name.startswith(name + "-")]
        if not family:
            known = ", ".join(one.name for one in EXPERIMENTS)
            raise ConfigError(f"unknown experiment {name!r} in --only: choose from {known}")
        chosen.update(family)
    return [one for one in EXPERIMENTS if one.name in chosen]


def find(name: str) -> Experiment:
    """The experiment of exactly this name."""
    return next(experiment for experiment in EXPERIMENTS if experiment.name == name)
