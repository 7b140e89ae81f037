"""Moving a bundle's experts over several drives and back; interrupted, it stays what it was."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from flashmoe.bundle.manifest import EXPERTS_FOLDER, LayerRecord, Manifest, load_manifest
from flashmoe.bundle.progress import Progress
from flashmoe.bundle.reader import Bundle, ExpertLayer
from flashmoe.bundle.stripes import (
    LINK_FOLDERS,
    MARK_FILE,
    check_count,
    link_directories,
    marks_of,
    read_mark,
    take_directories,
    write_mark,
)
from flashmoe.bundle.writer import PARTIAL, PartialFile, write_manifest
from flashmoe.checkpoint.pread import read_exact
from flashmoe.errors import BundleError
from flashmoe.types import format_size

_SYNC_NBYTES = 256 << 20  # of dirty pages at most: they take memory until the drive has them
_SPARE_NBYTES = 16 << 20  # manifest, marks and the file system's own needs


@dataclass(frozen=True)
class StripeReport:
    """Where the experts are now, in order of their stripes, and how many bytes were copied for it."""

    path: Path
    directories: Sequence[Path]
    nbytes: int


@dataclass(frozen=True)
class _File:
    """A file to be: the records of one layer and stripe."""

    path: Path
    source: ExpertLayer
    record: LayerRecord
    experts: range

    @property
    def nbytes(self) -> int:
        return len(self.experts) * self.record.record_nbytes

    def is_whole(self) -> bool:
        """It has its final name only when all of it is durable."""
        return self.path.is_file() and self.path.stat().st_size == self.nbytes


def stripe(
    path: Path | str, directories: Sequence[Path | str], progress: Progress | None = None
) -> StripeReport:
    """Spread a bundle's experts over `directories`, expert e to number e % S; none: bring them back into the bundle.

    Each must be absent or empty, or hold one of these stripes already, whole or begun.  Every record is compared with
    its checksum.  The old files are deleted after the manifest has changed; until then the bundle is what it was, and
    the same call goes on where it stopped.  Directories that hold all stripes already, because drives have moved, are
    only linked anew.  Raises BundleError or ReadError.
    """
    path, given = Path(path), [Path(directory) for directory in directories]
    manifest = load_manifest(path)
    check_count(len(given), manifest.expert_count)
    if len({Path(record.file).name for record in manifest.experts}) != len(manifest.experts):
        raise BundleError(f"{path}: two layers have files of the same name: convert the model again")
    with _locked(path):
        places = take_directories(given, marks_of(manifest, len(given)))
        if not given and not manifest.stripes:
            return StripeReport(path, [path / EXPERTS_FOLDER], 0)
        held = len(given) == len(manifest.stripes) and _hold_all(places, manifest)
        bundle = Bundle.open(path, places if held else ())
        targets = places or [path / EXPERTS_FOLDER]
        nbytes = _copy_all(_files(bundle, targets), places, manifest, progress)
        old = _folders(bundle) - {target.resolve() for target in targets}
        _name_places(path, manifest, places)
        _delete_old(old, manifest)
    return StripeReport(path, targets, nbytes)


def _hold_all(places: Sequence[Path], manifest: Manifest) -> bool:
    """Whether every file of every stripe is there, in directories that were not necessarily written just now."""
    for i, (place, mark) in enumerate(zip(places, marks_of(manifest, len(places)), strict=True)):
        records = len(range(i, manifest.expert_count, len(places)))
        wanted = {place / record.file: records * record.record_nbytes for record in manifest.experts}
        if read_mark(place) != mark or any(
            not file.is_file() or file.stat().st_size != nbytes for file, nbytes in wanted.items()
        ):
            return False
    return True


def _files(bundle: Bundle, places: Sequence[Path]) -> list[_File]:
    experts = range(bundle.manifest.expert_count)
    return [
        _File(place / Path(record.file).name, layer, record, experts[i :: len(places)])
        for record, layer in zip(bundle.manifest.experts, bundle.expert_layers, strict=True)
        for i, place in enumerate(places)
    ]


def _copy_all(
    files: Sequence[_File], places: Sequence[Path], manifest: Manifest, progress: Progress | None
) -> int:
    """Write the files that are not there yet; their bytes."""
    missing = [file for file in files if not file.is_whole()]
    _check_space(missing)
    for mark, place in zip(marks_of(manifest, len(places)), places, strict=True):
        if read_mark(place) != mark:
            write_mark(place, mark)
    total, done = sum(file.nbytes for file in missing), 0
    for file in missing:
        for nbytes in _copy(file):
            done += nbytes
            if progress is not None:
                progress(done, total)
    return total


def _copy(file: _File) -> Iterator[int]:
    """Bytes of each record written."""
    nbytes, layer = file.record.record_nbytes, file.record.layer
    with PartialFile(file.path) as out:
        out.keep([])
        for expert in file.experts:
            stripe, offset = file.source.place(expert)
            data = read_exact(file.source.paths[stripe], offset, nbytes, keep_cached=False)
            if xxhash.xxh3_64_hexdigest(data.data) != file.record.xxh3[expert]:
                raise BundleError(
                    f"{file.source.paths[stripe]}: expert {expert} of layer {layer} does not match its checksum:"
                    " copy the bundle again or convert the model again"
                )
            out.write(data)
            if out.unsynced >= _SYNC_NBYTES:
                out.sync()
            yield nbytes
        out.finish()


def _check_space(files: Sequence[_File]) -> None:
    needed, folders = Counter[int](), dict[int, Path]()
    for file in files:
        folder = next(parent for parent in file.path.parents if parent.exists())
        device = folder.stat().st_dev
        needed[device] += file.nbytes
        folders[device] = folder
    for device, nbytes in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if free < nbytes + _SPARE_NBYTES:
            raise BundleError(
                f"{folders[device]} needs {format_size(nbytes + _SPARE_NBYTES)}, its drive has"
                f" {format_size(free)} free: free some, or name a directory on another drive"
            )


def _name_places(path: Path, manifest: Manifest, places: Sequence[Path]) -> None:
    """Everything is durable: with the new manifest the bundle's experts are there."""
    used = {Path(name).parts[0] for name in manifest.stripes}
    links = next(name for name in LINK_FOLDERS if name not in used)
    names = link_directories(path, links, places) if places else []
    folder = Path() if places else Path(EXPERTS_FOLDER)
    experts = [replace(one, file=str(folder / Path(one.file).name)) for one in manifest.experts]
    write_manifest(path, replace(manifest, experts=experts, stripes=tuple(names)))
    for name in used.intersection(LINK_FOLDERS):
        shutil.rmtree(path / name)  # links: what they lead to stays


def _folders(bundle: Bundle) -> set[Path]:
    """Where the files of the experts really are, and where an earlier run may have left some."""
    folders = {file.parent.resolve() for layer in bundle.expert_layers for file in layer.paths}
    return folders | {(bundle.path / EXPERTS_FOLDER).resolve()}


def _delete_old(folders: set[Path], manifest: Manifest) -> None:
    """Delete what the bundle consisted of in these folders."""
    names = [Path(record.file).name for record in manifest.experts]
    for folder in sorted(folders):
        for name in [*names, *(name + PARTIAL for name in names), MARK_FILE]:
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the root of a drive, or with somebody else's files: it stays
            folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Nobody else moves this bundle's experts at the same time."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise BundleError(f"{path} is being striped by another command: wait for it or stop it") from error
    finally:
        os.close(fd)
