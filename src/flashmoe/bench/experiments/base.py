"""What experiments share: exchanging an engine's reader, cache or pool before its first token."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from flashmoe.engine.experts import StreamedExperts
from flashmoe.engine.loading import QUEUE_DEPTH, Parts, reader_files
from flashmoe.errors import FlashmoeError
from flashmoe.store.cache import ExpertCache
from flashmoe.store.policies import LayeredLru
from flashmoe.store.reader import ExpertReader, NativeReader
from flashmoe.store.slots import SlotArena


class UnavailableError(FlashmoeError):
    """This machine cannot run the experiment; the message says what is missing."""


class Variant(Protocol):
    """An experiment at work in an engine."""

    def note(self) -> str:
        """What only the run could tell, "" for nothing."""

    def close(self) -> None:
        """End threads, close files.  Called once, after the last token."""


class Plain:
    """A variant that has nothing to tell and nothing of its own but, perhaps, a reader."""

    def __init__(self, reader: NativeReader | None = None) -> None:
        self._reader = reader

    def note(self) -> str:
        """See Variant."""
        return ""

    def close(self) -> None:
        """See Variant."""
        if self._reader is not None:
            self._reader.close()


def reader_paths(parts: Parts) -> list[Path]:
    """The files that the numbers in a Read stand for: the resident weights, then each layer's experts."""
    return reader_files(parts.bundle)


def expert_paths(parts: Parts) -> list[Path]:
    """The files that hold experts."""
    return reader_paths(parts)[1:]


def native_reader(parts: Parts, queue_depth: int = QUEUE_DEPTH, engine: str = "auto") -> NativeReader:
    """A second reader over the same files, in the mode of the engine's own."""
    direct = "on" if parts.reader.mode == "direct" else "off"
    return NativeReader(reader_paths(parts), direct, engine, queue_depth)


def exchange(
    parts: Parts,
    *,
    reader: ExpertReader | None = None,
    arena: SlotArena | None = None,
    cache_class: type[ExpertCache] = ExpertCache,
    lookahead: str = "auto",
) -> None:
    """Give the engine another reader, pool, cache or lookahead; whatever is None stays as it is.

    To be called before the first token: the pool must be empty.
    """
    old = parts.cache
    arena = arena or old._arena
    parts.cache = cache_class(
        reader or parts.reader,
        arena,
        LayeredLru(),
        old.places,
        experts_per_token=old.experts_per_token,
    )
    parts.experts = streamed_experts(parts, parts.cache, arena, lookahead)


def streamed_experts(
    parts: Parts, cache: ExpertCache, arena: SlotArena, lookahead: str = "auto"
) -> StreamedExperts:
    """What runs the experts of this cache."""
    layouts = {layer.layer: layer.ffn for layer in parts.bundle.expert_layers}
    return StreamedExperts(parts.ops, cache, arena, layouts, lookahead, parts.model.config.num_experts)
