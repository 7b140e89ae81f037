"""A failed read fails its request with one clear line; the engine lives on, and what comes next has the same bits."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.chat.llm import LLM
from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.errors import BundleError, ReadError
from flashmoe.store.fake_reader import FakeReader, Fault

GOLDEN = Path(__file__).parents[1] / "golden"
scripted_only = pytest.mark.parametrize("machine", ["scripted"], indirect=True)
# (disaster, what the line says about it)
DISASTERS = [
    ("gone", r"at byte \d+: Input/output error \(errno 5\)"),
    ("cut", r"at byte \d+: the file ends after \d+ of 65536 bytes"),
    ("flipped", r"its record: the checksum does not match"),
]


def owners(engine: Engine) -> list[int]:
    """Every slot once for each of its owners."""
    cache: Any = engine._parts.cache
    resident = [slot for layer in cache._resident.values() for slot in layer.values()]
    return sorted(
        [*resident, *cache._staging, *cache._foreseen, *cache._arrived, *cache._landed, *cache._arena._free]
    )


def one_clear_line(error: BaseException, machine: Any, words: str) -> None:
    line = str(error)
    assert re.fullmatch(rf"layer \d+, expert \d+: cannot read .*{words}: run `flashmoe verify` on .*", line)
    assert "\n" not in line
    if "checksum" not in words:
        assert str(machine.bundle / "experts" / "layer-") in line


@pytest.mark.parametrize(("disaster", "words"), DISASTERS)
@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_after_a_disaster_the_same_engine_gives_the_same_bits(
    machine: Any, undisturbed: bytes, disaster: str, words: str, when: str
) -> None:
    with machine.open(verify_reads=True, lookahead="on") as engine:
        if when == "answer":
            engine.logits(machine.prompt)
        with getattr(machine, disaster)():
            for _ in range(2):  # failing is no state: the second attempt fails in the same way
                with pytest.raises(ReadError) as caught:
                    machine.run(engine) if when == "prompt" else engine.feed(machine.prompt[:1])
                one_clear_line(caught.value, machine, words)
        assert machine.run(engine) == undisturbed
        assert owners(engine) == list(range(engine.plan.slots))


@pytest.mark.parametrize(("disaster", "words"), DISASTERS)
def test_after_a_disaster_the_same_llm_gives_the_same_text(
    machine: Any, greedy: Any, disaster: str, words: str
) -> None:
    with LLM(machine.bundle, context=64, expert_slots="5%", verify_reads=True) as llm:
        whole = llm.generate("Once upon a time", greedy)
        chunks = llm.stream("Once upon a time", greedy)
        begun = next(chunks).text
        with getattr(machine, disaster)(), pytest.raises(ReadError) as caught:
            list(chunks)
        one_clear_line(caught.value, machine, words)
        assert whole.text.startswith(begun)
        again = llm.generate("Once upon a time", greedy)
        assert (again.text, again.token_ids, again.finish_reason) == (
            whole.text,
            whole.token_ids,
            whole.finish_reason,
        )


def test_rows_of_an_embedding_that_stays_on_the_drive(tmp_path: Path, failing: Any) -> None:
    """They are read one by one for each token: their failures are told and forgotten in the same way."""
    bundle = convert(GOLDEN / "hf_next_bf16", tmp_path / "bundle").path
    with Engine.open(bundle, EngineOptions(context=64, expert_slots=2, verify_reads=True)) as engine:
        assert not engine.plan.embedding_resident
        ids = [(7 * i) % 90 for i in range(20)]
        before = engine.logits(ids).tobytes()
        for _ in range(2):
            with failing([bundle / "resident.safetensors"]), pytest.raises(ReadError) as caught:
                engine.logits(ids)
            assert re.fullmatch(
                rf"cannot read {bundle}/resident\.safetensors at byte \d+: Input/output error[^:]*: run .*",
                str(caught.value),
            )
        assert engine.logits(ids).tobytes() == before


def test_a_file_that_is_replaced_keeps_its_old_bytes_for_who_has_it_open(
    machine: Any, undisturbed: bytes, tmp_path: Path
) -> None:
    with machine.open(verify_reads=True) as engine:
        assert machine.run(engine) == undisturbed
        for file in machine.expert_files:
            shutil.copyfile(file, tmp_path / file.name)
            other = file.with_suffix(".new")
            other.write_bytes(os.urandom(file.stat().st_size))
            other.rename(file)
        try:
            assert machine.run(engine) == undisturbed
            with machine.open(verify_reads=True) as fresh, pytest.raises(ReadError, match="checksum"):
                machine.run(fresh)
        finally:
            for file in machine.expert_files:
                shutil.move(tmp_path / file.name, file)
    with machine.open(verify_reads=True) as fresh:
        assert machine.run(fresh) == undisturbed


def test_a_slow_drive_changes_nothing_but_the_stall(machine: Any, undisturbed: bytes) -> None:
    pause = 0.002
    with machine.open() as engine:
        completions, waits = machine.reader._completions, []

        def late() -> list[tuple[int, str]]:
            time.sleep(pause)
            waits.append(pause)
            done: list[tuple[int, str]] = completions()
            return done

        machine.reader._completions = late
        before = engine._parts.cache.stats()
        assert machine.run(engine) == undisturbed
        stalled = engine._parts.cache.stats().since(before).total.stall_seconds
        assert len(waits) > 30
        # Nearly all of them: guesses that have landed are asked for while nothing waits.
        assert stalled >= pause * len(waits) / 2


def test_a_router_whose_logits_are_no_numbers(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are finite and too large are read without complaint."""
    with machine.open() as engine:
        ops = engine._parts.ops
        route = ops.route

        def overflown(logits: Any, *others: Any) -> None:
            logits.fill(np.nan)
            route(logits, *others)

        monkeypatch.setattr(ops, "route", overflown)
        with pytest.raises(BundleError, match=r"layer 0: .*not a number; .*convert the checkpoint again"):
            machine.run(engine)


def test_without_checksums_damage_goes_through(machine: Any, undisturbed: bytes) -> None:
    """It is what --verify-reads is for."""
    with machine.open() as engine, machine.flipped():
        assert machine.run(engine) != undisturbed


@scripted_only
@pytest.mark.parametrize("slots", [4, 40])
@pytest.mark.parametrize("when", [0, 5, 300])
def test_ctrl_c_while_it_computes_loses_no_slot(
    machine: Any, undisturbed: bytes, monkeypatch: pytest.MonkeyPatch, slots: int, when: int
) -> None:
    """Even if something keeps the traceback, as notebooks do, and with it the frames that were interrupted."""
    with machine.open(expert_slots=slots, prefill_chunk=16) as engine:
        ops = engine._parts.ops
        compute, calls = ops.expert_ffn, iter(range(when))

        def interrupted(*arguments: Any) -> None:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            compute(*arguments)

        monkeypatch.setattr(ops, "expert_ffn", interrupted)
        with pytest.raises(KeyboardInterrupt) as kept:
            machine.run(engine)
        monkeypatch.undo()
        assert owners(engine) == list(range(slots))
        assert machine.run(engine) == undisturbed
    assert kept.tb is not None


@scripted_only
def test_nothing_of_a_request_reaches_the_next_one(machine: Any, undisturbed: bytes) -> None:
    """Whatever a damaged request has left in caches, scratch and free slots, NaN above all."""
    with machine.open() as engine:
        machine.run(engine)
        parts: Any = engine._parts
        for layer in parts.states[0].layers:
            for array in vars(layer).values():
                if isinstance(array, np.ndarray):
                    array.view(np.uint8)[...] = 0xFF  # NaN in every type of float
        for array in parts.model._work._buffers.values():
            array.view(np.uint8)[...] = 0xFF
        for slot in parts.cache._arena._free:
            start = slot * parts.cache._arena.record_nbytes
            parts.cache._arena.buffer.array()[start : start + parts.cache._arena.record_nbytes] = 0xFF
        assert machine.run(engine) == undisturbed


@scripted_only
@pytest.mark.parametrize("seed", range(4))
def test_random_faults_fail_their_request_or_change_nothing(
    machine: Any, undisturbed: bytes, seed: int
) -> None:
    rng = random.Random(seed)
    slots = rng.choice([4, 12, 40, 120])
    options = {"expert_slots": slots, "prefill_chunk": rng.choice([1, 7, 16]), "lookahead": "on"}
    outcomes = []
    with machine.open(verify_reads=True, **options) as engine:
        reader: FakeReader = machine.reader
        reader._order = lambda n: rng.sample(range(n), rng.randint(1, n))
        for count in (1, 3, 0, 9, 2, 0):
            for _ in range(count):
                reader.script(random_fault(rng))
            try:
                outcomes.append(machine.run(engine) == undisturbed)
            except ReadError as error:
                one_clear_line(error, machine, "(errno|the file ends|checksum).*")
                outcomes.append(None)
            assert owners(engine) == list(range(slots))
        reader.heal()
        assert machine.run(engine) == undisturbed
    assert False not in outcomes
    assert None in outcomes


def random_fault(rng: random.Random) -> Fault:
    kinds: list[dict[str, Any]] = [
        {"errno": rng.choice([errno.EIO, errno.ENODEV, errno.ESTALE])},
        {"short": rng.randrange(65536)},
        {"flip": True},
        {"delay": rng.randint(1, 9)},
    ]
    return Fault(rng.randint(1, 30), rng.randrange(8 * 65536), times=rng.randint(1, 2), **rng.choice(kinds))


def test_verified_resident_weights(machine: Any, undisturbed: bytes, tmp_path: Path) -> None:
    link = machine.bundle / "resident.safetensors"
    content = bytearray(link.read_bytes())
    target = link.resolve()
    content[len(content) // 2] ^= 1
    link.unlink()
    link.write_bytes(content)
    try:
        with pytest.raises(ReadError) as caught:
            machine.open(verify_reads=True)
        assert re.fullmatch(
            rf"{link}: tensor '[\w.]+' at byte \d+: the checksum does not match: run `flashmoe verify` .*",
            str(caught.value),
        )
        machine.open().close()
    finally:
        link.unlink()
        link.symlink_to(target)
    with machine.open(verify_reads=True) as engine:
        assert machine.run(engine) == undisturbed
