"""Compare every byte of a bundle with the checksums of its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from flashmoe.bundle.progress import Progress
from flashmoe.bundle.reader import Bundle
from flashmoe.checkpoint.pread import read_exact
from flashmoe.errors import ReadError

_CHUNK = 8 << 20  # bytes in memory at a time


@dataclass(frozen=True)
class Damage:
    """A part of the bundle that is not what was written; ``expert`` is None for anything but a record."""

    file: Path
    name: str
    expert: int | None
    offset: int
    nbytes: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.name} at byte {self.offset} ({self.nbytes} bytes): {self.reason}"


@dataclass(frozen=True)
class VerifyReport:
    """Bytes compared and everything found damaged, in file order."""

    nbytes: int
    damaged: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is damaged."""
        return not self.damaged


@dataclass(frozen=True)
class _Part:
    file: Path
    name: str
    expert: int | None
    offset: int
    nbytes: int
    xxh3: str


def verify(bundle: Bundle, progress: Progress | None = None) -> VerifyReport:
    """Hash every tensor, expert record and copied file; what cannot be read counts as damaged.

    Reads the whole bundle, 8 MiB at a time, leaving the page cache as it was.  Bundle.open checked the sizes.
    """
    parts = list(_parts(bundle))
    total, done = sum(part.nbytes for part in parts), 0
    damaged = []
    for part in parts:
        reason = _check(part)
        if reason is not None:
            damaged.append(Damage(part.file, part.name, part.expert, part.offset, part.nbytes, reason))
        done += part.nbytes
        if progress is not None:
            progress(done, total)
    return VerifyReport(total, tuple(damaged))


def _parts(bundle: Bundle) -> Iterator[_Part]:
    for name, file in bundle.manifest.files.items():
        yield _Part(bundle.path / name, "file", None, 0, file.nbytes, file.xxh3)
    for name in bundle.tensor_names():
        info = bundle.tensor(name)
        digest = bundle.manifest.tensors[name].xxh3
        yield _Part(bundle.resident_path, f"tensor {name}", None, info.offset, info.nbytes, digest)
    for record, layer in zip(bundle.manifest.experts, bundle.expert_layers, strict=True):
        for expert, digest in enumerate(record.xxh3):
            stripe, offset = layer.place(expert)
            name = f"expert {expert} of layer {record.layer}"
            yield _Part(layer.paths[stripe], name, expert, offset, record.record_nbytes, digest)


def _check(part: _Part) -> str | None:
    digest = xxhash.xxh3_64()
    end = part.offset + part.nbytes
    try:
        for start in range(part.offset, end, _CHUNK):
            digest.update(read_exact(part.file, start, min(_CHUNK, end - start), keep_cached=False).data)
    except ReadError as error:
        return str(error)
    return (
        None if digest.hexdigest() == part.xxh3 else "its checksum does not match: copy or convert it again"
    )
