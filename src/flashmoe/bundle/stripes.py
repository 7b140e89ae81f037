"""Experts striped over several directories: where each stripe lies, and how a directory says whose stripe it is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from flashmoe.bundle.manifest import MOST_STRIPES, LayerRecord, Manifest
from flashmoe.bundle.writer import sync_folder, write_whole
from flashmoe.errors import BundleError

MARK_FILE = "stripe.json"
LINK_FOLDERS = ("stripes-a", "stripes-b")  # two, so that new links can stand beside those that are in use
_MARK_NBYTES = 4096  # far more than a mark has: a larger file is something else


@dataclass(frozen=True)
class StripeMark:
    """What a directory holds: stripe number `stripe` of `stripes`, of the experts with this id."""

    experts: str
    stripe: int
    stripes: int


def experts_id(layers: Sequence[LayerRecord]) -> str:
    """One number (16 hex digits) for the content of all experts."""
    digest = xxhash.xxh3_64()
    for record in layers:
        digest.update("".join(record.xxh3).encode())
    return digest.hexdigest()


def marks_of(manifest: Manifest, stripes: int) -> list[StripeMark]:
    """The marks of all stripes, if there are so many."""
    name = experts_id(manifest.experts)
    return [StripeMark(name, i, stripes) for i in range(stripes)]


def write_mark(directory: Path, mark: StripeMark) -> None:
    """Say what `directory` holds or will hold; durable."""
    write_whole(directory / MARK_FILE, json.dumps(asdict(mark)).encode())


def read_mark(directory: Path) -> StripeMark | None:
    """What `directory` says it holds; None when it says nothing that can be understood."""
    try:
        with (directory / MARK_FILE).open("rb") as file:
            value = json.loads(file.read(_MARK_NBYTES))
        mark = StripeMark(value["experts"], value["stripe"], value["stripes"])
    except (OSError, ValueError, RecursionError, LookupError, TypeError):
        return None
    sound = type(mark.experts) is str and type(mark.stripe) is type(mark.stripes) is int
    return mark if sound else None


def find_stripes(folder: Path, manifest: Manifest, given: Sequence[Path] = ()) -> list[Path]:
    """The directories of the stripes of the bundle in `folder`, in order; [folder] itself when it has none.

    `given` replaces those that lie elsewhere now, in any order.  Raises BundleError when a directory is missing or
    holds something else.
    """
    if not manifest.stripes:
        if given:
            raise BundleError(
                f"{folder} keeps its experts in itself, not in {given[0]}:"
                " spread them first with `flashmoe stripe BUNDLE --experts-dir DIR`"
            )
        return [folder]
    marks = marks_of(manifest, len(manifest.stripes))
    places = {marks.index(_wanted_mark(directory, marks, folder)): directory for directory in given}
    found = []
    for i, name in enumerate(manifest.stripes):
        directory = places.get(i, folder / name)
        if read_mark(directory) != marks[i]:
            raise BundleError(_not_there(folder, directory, i, len(marks)))
        found.append(directory)
    return found


def _wanted_mark(directory: Path, marks: list[StripeMark], folder: Path) -> StripeMark:
    mark = read_mark(directory)
    if mark is None or mark not in marks:
        raise BundleError(
            f"{directory} holds no experts of {folder}: give the directories that `flashmoe stripe` or"
            " `flashmoe convert` wrote them to"
        )
    return mark


def _not_there(folder: Path, directory: Path, stripe: int, stripes: int) -> str:
    where = f"{directory} (a link to {os.readlink(directory)})" if directory.is_symlink() else str(directory)
    which = f"experts {stripe + 1} of {stripes} of {folder}"
    if not directory.is_dir():
        return f"{where} with {which} is missing: mount its drive, or say where it is with --experts-dir"
    return (
        f"{where} does not hold {which}: mount the right drive there, or say where it is with --experts-dir"
    )


def check_count(stripes: int, experts: int) -> None:
    """Raise BundleError when there are more directories than experts, or than we allow."""
    if stripes and not experts:
        raise BundleError("the model has no experts to spread over directories: leave --experts-dir out")
    if stripes > min(experts, MOST_STRIPES):
        raise BundleError(
            f"{stripes} directories are too many for {experts} experts a layer:"
            f" give at most {min(experts, MOST_STRIPES)} --experts-dir"
        )


def take_directories(
    given: Sequence[Path], marks: Sequence[StripeMark] = (), begun: bool = False
) -> list[Path]:
    """Absolute directories for the stripes, in order; those that are missing are created.

    Each must be empty; or carry one of the `marks`, whose stripe it then gets; or be part of what was `begun`.  Raises
    BundleError.
    """
    directories = [directory.absolute() for directory in given]
    if len({directory.resolve() for directory in directories}) != len(directories):
        raise BundleError("the same --experts-dir was given twice: name another drive's, or leave it out")
    for directory in directories:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            used = any(directory.iterdir())
        except OSError as error:
            raise BundleError(
                f"{directory} cannot be used ({error.strerror}): choose another directory"
            ) from error
        if used and not begun and read_mark(directory) not in marks:
            raise BundleError(
                f"{directory} is not empty and holds no such experts: choose an empty directory"
            )
    kept = {read_mark(directory): directory for directory in directories}
    fresh = iter([directory for directory in directories if read_mark(directory) not in marks])
    return [kept.get(mark) or next(fresh) for mark in marks] if marks else directories


def link_directories(folder: Path, links: str, directories: Sequence[Path]) -> list[str]:
    """Make folder/links/0, 1, ... lead to the directories, durably; their names for the manifest."""
    try:
        (folder / links).mkdir(exist_ok=True)
        for old in (folder / links).iterdir():
            old.unlink()
        for i, directory in enumerate(directories):
            (folder / links / str(i)).symlink_to(directory)
        sync_folder(folder / links)
        sync_folder(folder)
    except OSError as error:
        raise BundleError(
            f"cannot link directories in {folder / links} ({error.strerror}): make it writable and try again"
        ) from error
    return [f"{links}/{i}" for i in range(len(directories))]
