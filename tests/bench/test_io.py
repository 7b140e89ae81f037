"""flashmoe bench io: our reader and fio on the same records, in turn, and what is said when one is missing."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.bench import fio as fio_module
from flashmoe.bench import io as io_module
from flashmoe.bench.fio import ENGINES, find_fio
from flashmoe.bench.io import Contender, IoOptions, measure, record_files
from flashmoe.bundle.reader import Bundle
from flashmoe.cli import main
from flashmoe.errors import ConfigError, ReadError

FAST = IoOptions(depths=(1, 8), sweep_seconds=0.01, seconds=0.02, repeats=2)
WORDS = ["--depths", "2,8", "--seconds", "0.02", "--repeats", "1"]
RATE = 5e8
NBYTES = 1 << 50  # more than any time in which the fake may be seen reading makes slower than RATE


@pytest.fixture
def fake_fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a program on PATH that answers as fio does after `body`, and writes down how it was called."""

    def install(body: str = "") -> Path:
        program, calls = tmp_path / "fio", tmp_path / "calls"
        program.write_text(
            f"""#!{sys.executable}
import json, sys
if sys.argv[1] == "--version":
    print("fio-3.0")
    sys.exit(0)
options = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:] if "=" in word)
open({str(calls)!r}, "a").write(json.dumps(options | {{"flags": sys.argv}}) + "\\n")
nbytes = {NBYTES}
{body}
print("a warning")
print(json.dumps({{"jobs": [{{"read": {{"bw_bytes": {RATE}, "io_bytes": nbytes}}}}]}}))
"""
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
        return calls

    return install


def silent(text: str) -> None:
    """Progress that nobody reads."""


def test_everybody_reads_the_same_records(demo_bundle: Path, fake_fio: Callable[[str], Path]) -> None:
    calls = fake_fio("")
    bundle = Bundle.open(demo_bundle)
    files = record_files(bundle)
    assert files.paths == tuple(layer.path for layer in bundle.expert_layers)
    heard: list[str] = []
    report = measure(files, FAST, heard.append)
    rows = {(row["by"], row["engine"], row["queue_depth"]) for row in report["sweep"]}
    ours = {row for row in rows if row[0] == "flashmoe"}
    assert {("flashmoe", "threads", 1), ("flashmoe", "threads", 8)} <= ours
    assert rows - ours == {("fio", engine, depth) for engine in ENGINES for depth in (1, 8)}
    best = {row["engine"]: row for row in report["duel"] if row["by"] == "fio"}
    assert all(row["bytes_per_second"] == RATE and row["ratio_to_fio"] == 1 for row in best.values())
    in_use = next(row for row in report["duel"] if row["queue_depth"] == 8)
    assert (in_use["by"], in_use["engine"]) == ("flashmoe", report["engine"])
    assert 0 < in_use["low"] <= in_use["bytes_per_second"] <= in_use["high"]
    assert report["ratio_in_use"] == in_use["ratio_to_fio"] <= report["ratio"]
    rounds = [text for text in heard if text.endswith("of 2")]
    names = [text.split(",")[0] for text in rounds]
    half = len(names) // 2
    assert names[:half] == names[half:][::-1], "the second round goes backwards"
    for line in calls.read_text().splitlines():
        options = json.loads(line)
        assert options["filename"].split(":") == [str(path) for path in files.paths]
        assert int(options["bs"].split(",")[0]) == files.record_nbytes
        assert {"--direct=1", "--readonly", "--norandommap", "--rw=randread"} <= set(options["flags"])
        assert ("numjobs" in options) == (options["ioengine"] == "psync")


def test_an_engine_that_is_refused_is_left_out_with_a_remark(
    demo_bundle: Path, fake_fio: Callable[[str], Path]
) -> None:
    fake_fio("if options['ioengine'] == 'libaio': sys.exit('engine libaio not loadable')")
    report = measure(record_files(Bundle.open(demo_bundle)), FAST, silent)
    engines = {row["engine"] for row in report["sweep"] + report["duel"] if row["by"] == "fio"}
    assert engines == {"psync", "io_uring"}
    assert "fio with libaio failed: engine libaio not loadable" in report["remarks"]


def test_without_fio_its_column_is_missing(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    results = tmp_path / "new" / "results.jsonl"
    assert main(["bench", "io", str(demo_bundle), *WORDS, "--json", "--results", str(results)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(results.read_text()) == report
    assert report["fio"] is None is report["ratio"]
    assert {row["by"] for row in report["sweep"] + report["duel"]} == {"flashmoe"}
    assert main(["bench", "io", str(demo_bundle), *WORDS, "--places", "20"]) == 0
    out = capsys.readouterr().out
    assert "fio is not installed" in out
    assert "of fio's best," not in out


def test_another_program_of_that_name_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "fio"
    program.write_text(f"#!{sys.executable}\nprint('fiona 1.9')\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found, reason = find_fio()
    assert found is None
    assert "another program" in reason


@pytest.mark.parametrize(
    ("body", "reason"), [("print('no json'); sys.exit(0)", "cannot read"), ("1/0", "failed")]
)
def test_a_fio_that_answers_nonsense_is_named(
    fake_fio: Callable[[str], Path], body: str, reason: str
) -> None:
    fake_fio(body)
    fio, _ = find_fio()
    assert fio is not None
    with pytest.raises(ConfigError, match=f"fio with psync.*{reason}"):
        fio.read("psync", 2, [Path("a:b")], 4096, 0.01)


def test_threads_that_each_take_their_own_time_are_timed_together(
    tmp_path: Path, fake_fio: Callable[[str], Path]
) -> None:
    record = 4 << 20
    (tmp_path / "records").write_bytes(bytes(2 * record))
    fake_fio(f"""
import mmap, os, time
try:
    file = os.open({str(tmp_path / "records")!r}, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, {record}) as room:
        for i in range(2):
            time.sleep(0.1)
            os.preadv(file, [room], i * {record})
        time.sleep(0.1)
    nbytes = {2 * record}
except (OSError, AttributeError):
    sys.exit("no direct reads")
""")
    fio, _ = find_fio()
    assert fio is not None
    try:
        rate = fio.read("psync", 2, [tmp_path / "records"], record, 0.01)
    except ConfigError as error:
        pytest.skip(str(error))
    assert rate <= 2 * record / 0.1


def test_colons_in_names_are_escaped() -> None:
    assert fio_module._escaped(Path("/a:b")) == "/a\\:b"


def test_a_file_that_ends_early_is_told(tmp_path: Path) -> None:
    path = tmp_path / "layer-000.bin"
    path.write_bytes(bytes(4096))
    files = io_module.RecordFiles((path,), (1,), 4096)
    runs = io_module._Measurements(files, None, FAST)
    assert runs.rate(Contender("flashmoe", "threads", 4), 0.01) > 0
    path.write_bytes(b"")
    with pytest.raises((ReadError, ValueError), match=r"layer-000\.bin"):
        runs.rate(Contender("flashmoe", "threads", 4), 0.01)


@pytest.mark.parametrize("depths", ["0", "8,257", "x"])
def test_depths_have_limits(depths: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", "--depths", depths]) == 2
    assert "--depths" in capsys.readouterr().err
