"""verify() finds what a drive or a careless copy did."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmoe.bundle import Bundle
from flashmoe.bundle.verify import verify


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_whole_bundle_is_ok_and_progress_reaches_the_end(small_bundle: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(Bundle.open(small_bundle), lambda done, total: seen.append((done, total)))
    assert report.ok
    assert seen[-1] == (report.nbytes, report.nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_flipped_byte_in_a_record_names_the_expert(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    layer = bundle.expert_layers[1]
    flip(layer.path, 2 * layer.record_nbytes + 777)
    (damage,) = verify(bundle).damaged
    assert (damage.file, damage.expert) == (layer.path, 2)
    assert (damage.offset, damage.nbytes) == (2 * layer.record_nbytes, layer.record_nbytes)
    assert "expert 2 of layer 1" in str(damage)


@pytest.mark.parametrize("name", ["norm", "embed_tokens", "layers.1.mlp.shared_expert"])
def test_a_flipped_byte_in_a_tensor_names_it(small_bundle: Path, name: str) -> None:
    bundle = Bundle.open(small_bundle)
    info = bundle.tensor(name)
    flip(bundle.resident_path, info.offset + info.nbytes - 1)
    (damage,) = verify(bundle).damaged
    assert (damage.name, damage.expert, damage.offset) == (f"tensor {name}", None, info.offset)


def test_a_changed_tokenizer_is_found(small_bundle: Path) -> None:
    flip(small_bundle / "tokenizer.json", 40)
    (damage,) = verify(Bundle.open(small_bundle)).damaged
    assert damage.file.name == "tokenizer.json"


def test_a_file_lost_after_opening_is_reported(small_bundle: Path) -> None:
    bundle = Bundle.open(small_bundle)
    bundle.expert_layers[0].path.unlink()
    assert [damage.expert for damage in verify(bundle).damaged] == [0, 1, 2, 3]
