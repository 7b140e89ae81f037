"""flashmoe bench io-experiments: every experiment gives the default's bits, and the report says what it took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bench.experiments import catalog, compare
from flashmoe.bench.experiments.arm import ArmOptions, measure
from flashmoe.bench.experiments.base import exchange, reader_paths
from flashmoe.bench.experiments.compressed import CompressedRecords, open_codec, write_copy
from flashmoe.bench.experiments.footprint import cached_nbytes, drop_cached
from flashmoe.bench.experiments.prediction import PreviousToken
from flashmoe.bench.experiments.reads import SplitReader
from flashmoe.bench.experiments.threaded import Files, ThreadedReader
from flashmoe.cli import main
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.errors import ConfigError, FlashmoeError, ReadError
from flashmoe.store.reader import AlignedBuffer, NativeReader

IDS = (11, 4000, 52, 11, 700)
SLOTS = 60  # of the demo model's 240 experts


def arm(bundle: Path, experiment: str | None, **changes: Any) -> dict[str, Any]:
    options = {"memory_bytes": None, "expert_slots": SLOTS, "ids": IDS, "warm": 2} | changes
    return measure(ArmOptions(str(bundle), experiment=experiment, **options))


@pytest.fixture(scope="module")
def reference(demo_bundle: Path) -> dict[str, Any]:
    return arm(demo_bundle, None, record=True)


def test_the_reference_lists_what_every_token_read(reference: dict[str, Any]) -> None:
    assert len(reference["logits_xxh3"]) == len(reference["places_ends"]) == len(IDS)
    assert reference["places_ends"] == sorted(reference["places_ends"])
    assert reference["places_ends"][-1] == len(reference["places"]) > 0
    assert reference["slots"] == SLOTS


@pytest.mark.parametrize("name", [one.name for one in catalog.EXPERIMENTS])
def test_same_logits(name: str, demo_bundle: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    codec = catalog.find(name).codec
    if codec is not None:
        with Engine.open(demo_bundle, EngineOptions(expert_slots=SLOTS)) as engine:
            write_copy(reader_paths(engine._parts), map(tuple, reference["places"]), codec, tmp_path)
    report = arm(demo_bundle, name, scratch=str(tmp_path) if codec else None)
    if "unavailable" in report:
        assert name.startswith("mmap-")  # advice that this kernel does not know
        pytest.skip(report["unavailable"])
    assert report["logits_xxh3"] == reference["logits_xxh3"]
    assert report["tok_s"] > 0
    assert report["bytes_per_token"] >= 0
    assert report["process_bytes"] > 0


def test_variants_read_what_their_names_say(demo_bundle: Path, reference: dict[str, Any]) -> None:
    serial, temporal = arm(demo_bundle, "serial"), arm(demo_bundle, "temporal")
    assert serial["stall_share"] > 0
    assert "previous token" in temporal["note"]
    mapped = arm(demo_bundle, "mmap")
    if mapped["page_cache_bytes"] is not None:
        assert mapped["page_cache_bytes"] > 0


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    words = [
        "bench",
        "io-experiments",
        "--only",
        "serial,zstd",
        "--tokens",
        "2",
        "--warm",
        "1",
        "--repeats",
        "2",
    ]
    words += ["--scratch", str(tmp_path)]
    assert main([*words, "--json", "--results", str(results)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == report
    assert (report["slots"], report["experts"], report["skipped"]) == (60, 240, [])
    assert [row["name"] for row in report["results"]] == ["zstd", "serial"]
    for row in report["results"]:
        assert row["same_logits"] is True
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["tok_s"]["median"] > 0 < row["default_tok_s"]["median"]
        assert row["bytes_per_token"] > 0 < row["default_bytes_per_token"]
    assert "size 0." in report["results"][0]["note"]
    assert list(tmp_path.iterdir()) == [results]  # the compressed copy is gone
    assert main(words) == 0
    table = capsys.readouterr().out
    assert "read all misses, then compute" in table
    assert "all gave the same logits" in table


def test_text_is_fed_instead_of_random_tokens(demo_bundle: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    options = compare.CompareOptions(demo_bundle, warm=2, tokens=8, text=text)
    ids = compare._default_arm(options).ids
    assert len(ids) == 10
    assert ids != compare._default_arm(compare.CompareOptions(demo_bundle, warm=2, tokens=8)).ids
    text.write_text("The")
    with pytest.raises(ConfigError, match="give a longer --text"):
        compare._default_arm(options)


def test_a_missing_package_is_named_and_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "find_spec", lambda name: None)
    assert main(["bench", "io-experiments", "--only", "lz4,zstd", "--tokens", "1", "--warm", "1"]) == 0
    out = capsys.readouterr().out
    assert "skipped lz4: needs the package lz4: pip install 'flashmoe[experiments]'" in out
    assert "skipped zstd: needs the package zstandard: pip install 'flashmoe[experiments]'" in out


def test_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io-experiments", "--only", "serial,mmpa"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "flashmoe: error: unknown experiment 'mmpa' in --only: choose from python-reader, "
    )
    assert error.count("\n") == 1
    assert [one.name for one in catalog.choose(["mmap", "lookahead"])] == [
        "mmap",
        "lookahead-off",
        "lookahead-on",
    ]
    assert main(["bench", "io-experiments", "--list", "--only", "queue-depth"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_other_logits_are_an_error(demo_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(module: str, options: dict[str, Any]) -> dict[str, Any]:
        report = measure(ArmOptions(**options))
        if options["experiment"]:
            report["logits_xxh3"][1] = "0" * 16
        return report

    monkeypatch.setattr(compare, "run_module", run)
    options = compare.CompareOptions(demo_bundle, warm=1, tokens=1, repeats=1)
    with pytest.raises(FlashmoeError, match="split: logits of token 1 differ"):
        compare.compare(options, catalog.choose(["split"]), lambda text: None)


def test_a_copy_ends_where_its_room_does(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(1, 0, 100), (1, 100, 100), (1, 0, 100), (2, 0, 100)]
    reference = {"places": places, "places_ends": [1, 3, 4]}
    for room, tokens in ((300, 3), (299, 2), (200, 2)):
        monkeypatch.setattr(compare, "_MOST_COPIED", room)
        assert compare._copied_tokens(reference) == tokens
    monkeypatch.setattr(compare, "_MOST_COPIED", 199)
    with pytest.raises(FlashmoeError, match="two tokens are too many"):
        compare._copied_tokens(reference)


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_codecs_give_back_what_they_got(name: str) -> None:
    codec = open_codec(name)
    for data in (bytes(9000), np.random.default_rng(0).bytes(9000)):
        assert codec.decompress(codec.compress(data), len(data)) == data


def test_a_damaged_copy_is_a_read_error(demo_bundle: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    with Engine.open(demo_bundle, EngineOptions(expert_slots=SLOTS)) as engine:
        parts = engine._parts
        write_copy(reader_paths(parts), map(tuple, reference["places"]), "zstd", tmp_path)
        records = CompressedRecords(parts, tmp_path)
        (tmp_path / "records.bin").write_bytes(b"")
        try:
            with pytest.raises(ReadError, match="the file ends at byte"):
                engine.logits([1])
        finally:
            records.close()


def two_files(folder: Path) -> tuple[list[Path], list[bytes]]:
    contents = [np.random.default_rng(i).bytes(12288) for i in range(2)]
    paths = [folder / f"file-{i}" for i in range(2)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths, contents


def test_threaded_reader_completes_every_read_once(tmp_path: Path) -> None:
    paths, contents = two_files(tmp_path)
    files = Files(paths, direct=False)
    reader = ThreadedReader(files.fetch, 3)
    buffer = AlignedBuffer(12288, False)
    assert reader.wait() == []
    for tag in range(3):
        reader.submit((tag % 2, 4096 * tag, 4096, buffer, 4096 * tag), tag)
    reader.submit((0, 8192, 8192, buffer, 0), 9)  # beyond the end
    done = dict[int, str]()
    while completions := reader.wait():
        assert done.keys().isdisjoint(tag for tag, _ in completions)
        done.update(completions)
    assert sorted(done) == [0, 1, 2, 9]
    assert [done[tag] for tag in range(3)] == ["", "", ""]
    assert "the file ends at byte 12288" in done[9]
    assert buffer.array()[4096:8192].tobytes() == contents[1][4096:8192]
    reader.close()
    files.close()


def test_split_reader_joins_halves_and_tells_of_either(tmp_path: Path) -> None:
    paths, contents = two_files(tmp_path)
    inner = NativeReader(paths, "off", queue_depth=2)
    reader = SplitReader(inner, {12288: 4096})
    buffer = AlignedBuffer(16384, False)
    reader.submit((1, 0, 12288, buffer, 0), 5)
    reader.submit((0, 0, 4096, buffer, 12288), 6)  # of a size that is not cut
    done = dict(reader.wait())
    while completions := reader.wait():
        done.update(completions)
    assert done == {5: "", 6: ""}
    assert buffer.array().tobytes() == contents[1] + contents[0][:4096]
    assert inner.stats()[0] == 3
    inner.close()


def test_previous_token_guesses_what_left_the_pool() -> None:
    class Cache:
        def resident_experts(self, layer: int) -> set[int]:
            return {1}

    class Request:
        def __init__(self) -> None:
            self.foreseen: list[tuple[int, list[int]]] = []

        def foresee(self, *guesses: tuple[int, list[int]]) -> None:
            self.foreseen += guesses

    guesses, request = PreviousToken(Cache(), [0, 1]), Request()  # type: ignore[arg-type]
    for layer, experts in ((0, [1, 2]), (1, [1, 3]), (0, [2, 5])):
        guesses.judge(layer, experts)
        guesses.guess(lambda _: iter(()), 1)
    guesses.read(request)  # type: ignore[arg-type]
    guesses.read(request)  # type: ignore[arg-type]
    assert request.foreseen == [(1, [3])]
    assert (
        guesses.note()
        == "50% of experts were the previous token's; 1 of 2 such guesses were not in the pool any more"
    )


def test_pages_are_counted_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(64 << 10))
    path.read_bytes()
    cached = cached_nbytes([path])
    if cached is None:
        pytest.skip("this system does not tell")
    assert cached == 64 << 10
    assert cached_nbytes([path, path]) == 128 << 10
    with path.open("rb+") as file:
        file.flush()
    drop_cached([path])  # dirty pages may stay
    after = cached_nbytes([path])
    assert after is not None
    assert after <= cached


def test_the_default_is_the_engine_as_it_is(demo_bundle: Path) -> None:
    """exchange() with nothing to exchange leaves the logits and the reads as they are."""
    with Engine.open(demo_bundle, EngineOptions(expert_slots=SLOTS, lookahead="off")) as engine:
        wanted, reads = engine.logits(list(IDS)), engine._parts.cache.stats().bytes_read
    with Engine.open(demo_bundle, EngineOptions(expert_slots=SLOTS)) as engine:
        exchange(engine._parts, lookahead="off")
        np.testing.assert_array_equal(engine.logits(list(IDS)), wanted)
        assert engine._parts.cache.stats().bytes_read == reads
