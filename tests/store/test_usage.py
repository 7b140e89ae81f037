"""Counts of uses: what they favour, and a file that is whole, of this bundle, or not used."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashmoe.store.usage import HALF_LIFE, DamagedUsageError, UsageCounts

LAYERS = {0: 6, 3: 4}


def chosen(*rows: list[int]) -> np.ndarray:
    return np.array(rows, np.int32)


def counted() -> UsageCounts:
    counts = UsageCounts(LAYERS)
    counts.add(0, chosen([1, 2], [2, 5]))
    counts.add(3, chosen([0, 3], [3, 1]))
    return counts


def test_counts_are_uses_by_tokens() -> None:
    counts = counted()
    assert counts.counts(0).tolist() == [0, 1, 2, 0, 0, 1]
    assert counts.counts(3).tolist() == [1, 1, 0, 2]
    assert counts.tokens == 2


def test_favourites_share_the_slots_evenly_and_end_with_the_most_used() -> None:
    counts = counted()
    assert counts.favourites(2) == {0: [2], 3: [3]}
    assert counts.favourites(5) == {0: [5, 2], 3: [1, 3]}
    assert counts.favourites(100) == {0: [1, 5, 2], 3: [0, 1, 3]}, "never used: not worth a read"
    assert UsageCounts({}).favourites(4) == {}


def test_a_file_brings_them_back_and_new_uses_outweigh_old_ones(tmp_path: Path) -> None:
    file = tmp_path / "new" / "usage"
    counted().save(file, "me")
    later = UsageCounts(LAYERS)
    later.load(file, "me")
    assert later.tokens == 0
    assert later.counts(0).tolist() == [0, 1, 2, 0, 0, 1]
    later.add(0, np.tile(chosen([0, 1]), (HALF_LIFE, 1)))
    assert later.counts(0).tolist() == [HALF_LIFE, HALF_LIFE + 0.5, 1, 0, 0, 0.5]
    assert [path.name for path in file.parent.iterdir()] == ["usage"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "usage"
    counted().save(file, "me")
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        counted().save(file, "me")
    assert [path.name for path in tmp_path.iterdir()] == ["usage"]
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1], "damaged"),
        (lambda data: data[:20], "damaged"),
        (lambda data: data[:40] + b"x" + data[41:], "damaged"),
        (lambda data: data + b"\0", "damaged"),
        (lambda data: b"a letter to my aunt", "no usage file"),
        (lambda data: b"", "no usage file"),
    ],
)
def test_damage_is_told(tmp_path: Path, change: object, message: str) -> None:
    file = tmp_path / "usage"
    counted().save(file, "me")
    file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message) as raised:
        UsageCounts(LAYERS).load(file, "me")
    assert isinstance(raised.value, DamagedUsageError) == (message == "damaged")


def test_another_bundle_and_another_shape_are_told(tmp_path: Path) -> None:
    file = tmp_path / "usage"
    counted().save(file, "me")
    with pytest.raises(ValueError, match="another bundle"):
        UsageCounts(LAYERS).load(file, "you")
    with pytest.raises(ValueError, match="other layers"):
        UsageCounts({0: 6}).load(file, "me")
    strange = UsageCounts(LAYERS)
    strange._fresh[0][2] = np.nan
    strange.save(file, "me")
    with pytest.raises(ValueError, match="none"):
        UsageCounts(LAYERS).load(file, "me")
