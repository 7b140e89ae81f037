"""Readers: the same bytes from every one of them, and every failure told."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flashmoe.errors import ReadError
from flashmoe.store.fake_reader import FakeReader, Fault
from flashmoe.store.reader import AlignedBuffer, BulkReads, NativeReader

BLOCK = 4096
SIZE = 37 * BLOCK + 123  # the tail is no whole block
MakeReader = Callable[..., BulkReads]


def native(direct: str) -> MakeReader:
    def make(*paths: Path) -> BulkReads:
        try:
            return NativeReader(list(paths), direct)
        except ReadError as error:
            if direct == "on" and all(path.exists() for path in paths):
                pytest.skip(f"this file system has no direct reads: {error}")
            raise

    return make


@pytest.fixture(params=["direct", "buffered", "fake"])
def open_reader(request: pytest.FixtureRequest) -> MakeReader:
    """Every test that takes it runs over every reader."""
    kinds: dict[str, MakeReader] = {
        "direct": native("on"),
        "buffered": native("off"),
        "fake": lambda *paths: FakeReader(paths),
    }
    return kinds[request.param]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "layer-007.bin"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


def finish(reader: BulkReads) -> dict[int, str]:
    """tag -> error of all that is outstanding; each tag may come once."""
    outcomes: dict[int, str] = {}
    while completions := reader.wait():
        for tag, error in completions:
            assert tag not in outcomes
            outcomes[tag] = error
    return outcomes


def test_any_range_gives_the_files_bytes(open_reader: MakeReader, file: Path) -> None:
    reader, content, rng = open_reader(file), file.read_bytes(), random.Random(2)
    buffer = AlignedBuffer(60 * 40 * BLOCK, False)
    reads = {}
    for tag in range(60):
        offset = rng.randrange(38) * BLOCK
        # Whole blocks, or up to the end of the file: what records and tensors at its end need.
        nbytes = min(rng.randint(1, 38) * BLOCK, SIZE - offset)
        reads[tag] = (offset, nbytes)
        reader.submit((0, offset, nbytes, buffer, tag * 40 * BLOCK), tag)
    assert finish(reader) == dict.fromkeys(range(60), "")
    for tag, (offset, nbytes) in reads.items():
        start = tag * 40 * BLOCK
        assert buffer.array()[start : start + nbytes].tobytes() == content[offset : offset + nbytes]


def test_nothing_outside_the_range_is_written(open_reader: MakeReader, file: Path) -> None:
    reader, buffer = open_reader(file), AlignedBuffer(4 * BLOCK, False)
    buffer.array()[:] = 77
    reader.submit((0, 36 * BLOCK, BLOCK + 123, buffer, BLOCK), 5)
    assert finish(reader) == {5: ""}
    assert set(buffer.array()[:BLOCK]) == {77}
    assert set(buffer.array()[2 * BLOCK + 123 :]) == {77}


def test_without_reads_there_is_nothing_to_wait_for(open_reader: MakeReader, file: Path) -> None:
    assert open_reader(file).wait() == []


@pytest.mark.parametrize(
    "read",
    [
        (1, 0, BLOCK, 0),  # no such file
        (0, 38 * BLOCK, BLOCK, 0),  # begins behind the end
        (0, 37 * BLOCK, BLOCK, 0),  # ends behind the end
        (0, 0, 0, 0),  # nothing
        (0, 0, 5 * BLOCK, 0),  # longer than the buffer
        (0, 0, BLOCK, 4 * BLOCK),  # behind the buffer
        (0, 100, BLOCK, 0),
        (0, 0, BLOCK, 100),  # not aligned
        (0, 1 << 62, 1 << 62, 0),  # offset + size overflows nothing
    ],
)
def test_impossible_reads_are_refused_at_once(
    open_reader: MakeReader, file: Path, read: tuple[int, int, int, int]
) -> None:
    reader, (index, offset, nbytes, at) = open_reader(file), read
    with pytest.raises(ValueError, match=r"index|beyond|multiples"):
        reader.submit((index, offset, nbytes, AlignedBuffer(4 * BLOCK, False), at), 1)
    assert reader.wait() == []


def test_a_file_that_shrinks_fails_the_reads_behind_its_end(open_reader: MakeReader, file: Path) -> None:
    reader, buffer, content = open_reader(file), AlignedBuffer(4 * BLOCK, False), file.read_bytes()
    os.truncate(file, 10 * BLOCK + 50)
    for tag, offset in enumerate((9, 10, 30)):
        reader.submit((0, offset * BLOCK, BLOCK, buffer, tag * BLOCK), tag)
    outcomes = finish(reader)
    assert outcomes[0] == ""
    assert buffer.array()[:BLOCK].tobytes() == content[9 * BLOCK : 10 * BLOCK]
    assert outcomes[1] == f"{file} at byte {10 * BLOCK}: the file ends after 50 of {BLOCK} bytes"
    assert outcomes[2] == f"{file} at byte {30 * BLOCK}: the file ends after 0 of {BLOCK} bytes"


def test_a_shortened_tail_is_an_error_too(open_reader: MakeReader, file: Path) -> None:
    reader, buffer = open_reader(file), AlignedBuffer(BLOCK, False)
    os.truncate(file, SIZE - 1)
    with pytest.raises(ReadError, match=r"layer-007\.bin at byte .*flashmoe verify"):
        reader.read_into(0, 37 * BLOCK, 123, buffer, 0)


def test_a_prefetch_that_has_not_begun_can_be_taken_back(open_reader: MakeReader, file: Path) -> None:
    reader, buffer, content = open_reader(file), AlignedBuffer(40 * BLOCK, False), file.read_bytes()
    reader.submit((0, 0, 30 * BLOCK, buffer, 0), 1)
    for tag in range(2, 10):
        reader.submit((0, 30 * BLOCK, BLOCK, buffer, (28 + tag) * BLOCK), tag, prefetch=True)
    withdrawn = reader.withdraw()
    outcomes = finish(reader)
    assert sorted([*outcomes, *withdrawn]) == list(range(1, 10))
    assert set(outcomes.values()) == {""}
    assert reader.withdraw() == reader.poll() == reader.wait() == []
    for tag in set(outcomes) - {1}:
        at = (28 + tag) * BLOCK
        assert buffer.array()[at : at + BLOCK].tobytes() == content[30 * BLOCK : 31 * BLOCK]


def test_polling_never_blocks_and_loses_nothing(open_reader: MakeReader, file: Path) -> None:
    reader, buffer = open_reader(file), AlignedBuffer(8 * BLOCK, False)
    assert reader.poll() == []
    for tag in range(8):
        reader.submit((0, tag * BLOCK, BLOCK, buffer, tag * BLOCK), tag)
    seen = dict(reader.poll())
    seen |= finish(reader)
    assert seen == dict.fromkeys(range(8), "")


def test_bulk_reads_in_pieces(open_reader: MakeReader, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    content = random.Random(3).randbytes(BLOCK)
    with path.open("wb") as out:  # 17 MiB: three pieces; a hole reads as zeros
        out.seek((17 << 20) - BLOCK)
        out.write(content)
    reader, buffer = open_reader(path), AlignedBuffer(17 << 20, False)
    reader.read_into(0, 0, 17 << 20, buffer, 0)
    assert not buffer.array()[:-BLOCK].any()
    assert buffer.array()[-BLOCK:].tobytes() == content


def test_after_a_failed_bulk_read_the_next_one_works(open_reader: MakeReader, file: Path) -> None:
    reader, buffer = open_reader(file), AlignedBuffer(2 * BLOCK, False)
    os.truncate(file, 5 * BLOCK)
    with pytest.raises(ReadError, match=r"layer-007\.bin"):
        reader.read_many([(0, 0, BLOCK, buffer, 0), (0, 9 * BLOCK, BLOCK, buffer, BLOCK)])
    reader.read_many([(0, BLOCK, BLOCK, buffer, 0), (0, 4 * BLOCK, BLOCK, buffer, BLOCK)])
    content = file.read_bytes()
    assert buffer.array().tobytes() == content[BLOCK : 2 * BLOCK] + content[4 * BLOCK :]


def test_a_refused_bulk_read_leaves_nothing_in_flight(open_reader: MakeReader, file: Path) -> None:
    reader, buffer = open_reader(file), AlignedBuffer(BLOCK, False)
    with pytest.raises(ValueError, match="beyond the end"):
        reader.read_many([(0, 0, BLOCK, buffer, 0), (0, 99 * BLOCK, BLOCK, buffer, 0)])
    assert reader.wait() == []


@pytest.mark.parametrize("direct", ["auto", "on", "off"])
def test_a_missing_file_is_named(tmp_path: Path, file: Path, direct: str) -> None:
    with pytest.raises(ReadError, match=r"layer-008\.bin: No such file.*check the bundle"):
        NativeReader([file, tmp_path / "layer-008.bin"], direct)


def test_the_mode_and_its_reason_are_told(file: Path) -> None:
    reader = NativeReader([file], "off")
    assert (reader.mode, reader.reason) == ("buffered", "buffered reads were asked for")
    assert NativeReader([file]).mode in ("direct", "buffered")


def test_what_was_read_is_counted(file: Path) -> None:
    reader, buffer = NativeReader([file], "off", queue_depth=4), AlignedBuffer(8 * BLOCK, False)
    reader.read_many([(0, i * BLOCK, BLOCK, buffer, i * BLOCK) for i in range(8)])
    reads, nbytes, seconds, most = reader.stats()
    assert (reads, nbytes) == (8, 8 * BLOCK)
    assert seconds > 0
    assert 1 <= most <= 4


@pytest.mark.parametrize("depth", [0, 257])
def test_the_queue_depth_has_limits(file: Path, depth: int) -> None:
    with pytest.raises(ReadError, match="queue depth"):
        NativeReader([file], "off", queue_depth=depth)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot drop single files' pages")
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_reads_leave_the_page_cache_alone(tmp_path: Path, direct: str) -> None:
    record, count = 16 * BLOCK, 256
    path = tmp_path / "records.bin"
    path.write_bytes(random.Random(4).randbytes(record * count))
    drop_cached(path)
    if cached_nbytes(path):
        pytest.skip("this file system keeps its files in memory")
    reader, buffer = NativeReader([path], direct), AlignedBuffer(8 * record, False)
    order = random.Random(5).sample(range(count), count // 2)
    for start in range(0, len(order), 8):
        batch = order[start : start + 8]
        reader.read_many([(0, e * record, record, buffer, i * record) for i, e in enumerate(batch)])
    assert cached_nbytes(path) == 0


def drop_cached(path: Path) -> None:
    """Write back and forget a file's pages."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def cached_nbytes(path: Path) -> int:
    """Bytes of a file in the page cache, by mincore(2)."""
    nbytes = path.stat().st_size
    present = (ctypes.c_ubyte * -(-nbytes // BLOCK))()
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), nbytes, prot=mmap.PROT_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(nbytes), present):
            pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
        del view
    return BLOCK * sum(flag & 1 for flag in present)


# A read that never ends: the kernel waits for a page of the buffer that userfaultfd(2) never delivers.
HANGING_READ = """
import ctypes, os, struct, sys
from pathlib import Path
from flashmoe.store.reader import AlignedBuffer, NativeReader
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.syscall(323, os.O_CLOEXEC)
buffer = AlignedBuffer(4096, False)
api = ctypes.create_string_buffer(struct.pack("QQQ", 0xAA, 0, 0))
register = ctypes.create_string_buffer(struct.pack("QQQQ", buffer.address, 4096, 1, 0))
if fd < 0 or libc.ioctl(fd, 0xC018AA3F, api) or libc.ioctl(fd, 0xC020AA00, register):
    sys.exit(77)
reader = NativeReader([Path(sys.argv[1])], "off")
reader.submit((0, 0, 4096, buffer, 0), 1)
try:
    print("reading", flush=True)
    reader.wait()
except KeyboardInterrupt:
    print("interrupted", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="needs userfaultfd by its x86-64 number"
)
def test_ctrl_c_interrupts_a_read_that_hangs(file: Path) -> None:
    command = [sys.executable, "-c", HANGING_READ, str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            if process.stdout.readline() != "reading\n":
                assert process.wait(timeout=60) == 77
                pytest.skip("userfaultfd is not allowed here")
            time.sleep(0.2)  # it is most likely inside wait() then; earlier is as good, but tests less
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "interrupted\n"
        finally:
            process.kill()


class TestFakeReader:
    """What only the scripted reader can do."""

    def test_the_order_is_scripted(self) -> None:
        reader = FakeReader([bytes(4 * BLOCK)], order=lambda n: [n - 1])
        buffer = AlignedBuffer(4 * BLOCK, False)
        for tag in range(4):
            reader.submit((0, tag * BLOCK, BLOCK, buffer, tag * BLOCK), tag)
        assert [reader.wait() for _ in range(5)] == [[(3, "")], [(2, "")], [(1, "")], [(0, "")], []]
        assert reader.reads == [(0, i * BLOCK, BLOCK) for i in range(4)]

    def test_a_buffer_has_its_bytes_only_after_completion(self) -> None:
        reader, buffer = FakeReader([b"x" * BLOCK]), AlignedBuffer(BLOCK, False)
        reader.submit((0, 0, BLOCK, buffer, 0), 1)
        assert b"x" not in buffer.array().tobytes()
        reader.wait()
        assert buffer.array().tobytes() == b"x" * BLOCK

    def test_a_delayed_read_is_passed_over(self) -> None:
        reader, buffer = FakeReader([bytes(2 * BLOCK)], order=lambda n: [0]), AlignedBuffer(BLOCK, False)
        reader.script(Fault(0, 0, delay=2))
        for tag, offset in enumerate((0, BLOCK, BLOCK, BLOCK)):
            reader.submit((0, offset, BLOCK, buffer, 0), tag)
        assert [reader.wait()[0][0] for _ in range(4)] == [1, 2, 0, 3]

    def test_faults_happen_as_often_as_scripted(self) -> None:
        reader, buffer = FakeReader([b"\0" * 3 * BLOCK]), AlignedBuffer(BLOCK, False)
        reader.script(Fault(0, BLOCK + 7, errno=errno.EIO, times=2))
        outcomes = []
        for _ in range(3):
            reader.submit((0, BLOCK, BLOCK, buffer, 0), 9)
            outcomes += reader.wait()
        assert outcomes == [(9, f"file 0 at byte {BLOCK}: Input/output error (errno 5)")] * 2 + [(9, "")]

    def test_a_short_read_and_a_wrong_bit(self) -> None:
        reader, buffer = FakeReader([b"\0" * BLOCK]), AlignedBuffer(BLOCK, False)
        reader.script(Fault(0, 0, short=10))
        reader.submit((0, 0, BLOCK, buffer, 0), 1)
        assert reader.wait() == [(1, f"file 0 at byte 0: the file ends after 10 of {BLOCK} bytes")]
        assert not buffer.array()[:10].any()
        assert buffer.array()[10:].all()
        reader.script(Fault(0, 99, flip=True))
        reader.submit((0, 0, BLOCK, buffer, 0), 1)
        assert reader.wait() == [(1, "")]
        assert np.flatnonzero(buffer.array()).tolist() == [99]
