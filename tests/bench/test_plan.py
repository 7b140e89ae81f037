"""flashmoe plan: what it measures and leaves behind, what it refuses, and that its sizes are the engine's."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flashmoe.bench import machine_rates
from flashmoe.bench.machine_rates import BATCHES, measure_drive, scratch_file
from flashmoe.bench.plan import model_work
from flashmoe.cli import main
from flashmoe.cli.inspect import config_of
from flashmoe.convert import describe
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.workbench import Workbench
from flashmoe.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = GOLDEN / "hf_multimodal_bf16" / "config.json"
NEXT = GOLDEN / "hf_next_bf16" / "config.json"
GIVEN = ["--drive", "2", "--memory-bandwidth", "30", "--int8", "400"]
RECORD = 8192


@pytest.fixture
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that takes its time, in small."""
    for name in ("SCRATCH_NBYTES", "_FILL_NBYTES"):
        monkeypatch.setattr(machine_rates, name, 4 << 20)
    for name in ("_SECONDS", "_STREAM_SECONDS", "_MEMORY_SECONDS"):
        monkeypatch.setattr(machine_rates, name, 0.05)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Runs `flashmoe plan ... --json`."""

    def run(*words: object) -> dict[str, Any]:
        code = main(["plan", *map(str, words), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a plan that must fail with one line."""

    def run(*words: object) -> str:
        code = main(["plan", *map(str, words)])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (1, "", 1), out + err
        return err.removeprefix("flashmoe: error: ").rstrip("\n")

    return run


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """The system refuses to let any file grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_work_is_what_the_engine_counts(demo_bundle: Path) -> None:
    facts = describe(demo_bundle)
    work = model_work(config_of(demo_bundle), facts, facts["experts_per_token"], "f16")
    with Engine.open(demo_bundle, EngineOptions(context=64)) as engine:
        bench = Workbench(engine)
        each, head = bench.multiply_adds()
        nbytes, at_hundred = bench.step_nbytes(0), bench.step_nbytes(100)
    token = work.dense.plus(work.shared).plus(work.expert, work.expert_layers * work.per_token)
    assert (token.products, work.head.products) == (each, head)
    assert token.nbytes + work.head.nbytes == nbytes
    assert 100 * work.position.nbytes == at_hundred - nbytes


def test_a_bundle_is_measured_in_place(
    demo_bundle: Path,
    plan: Callable[..., dict[str, Any]],
    refused: Callable[..., str],
    small_scratch: None,
    tmp_path: Path,
) -> None:
    before = sorted(demo_bundle.rglob("*"))
    smallest = refused(demo_bundle, "--memory", "1MiB").split("--memory ")[1].split("MiB")[0]
    budgets = f"{int(smallest) + 64}MiB,2GiB"  # this process holds more with each test
    report = plan(demo_bundle, "--memory", budgets, "--prompt", "16,100")
    machine = report["machine"]
    assert machine["given"] == []
    assert str(demo_bundle) in machine["drive"]["source"]
    assert [point["reads"] for point in machine["drive"]["reads_together"]] == list(BATCHES)
    assert min(machine["memory_bytes_per_second"], machine["int8_products_per_second"]) > 1e8
    small, large = report["budgets"]
    assert small["plan"]["slots"] <= large["plan"]["slots"] == large["plan"]["experts"]
    assert large["decode"]["low"]["hit_rate"] == 1.0
    for entry in (small, large):
        assert set(entry["prefill"]) == {"16", "100"}
        for speeds in (entry["decode"], *entry["prefill"].values()):
            assert 0 < speeds["low"]["tok_s"] <= speeds["high"]["tok_s"]
    assert sorted(demo_bundle.rglob("*")) == before
    assert main(["plan", str(demo_bundle), "--dir", str(tmp_path), "--prompt", ""]) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_was_foretold_stands_beside_what_is_measured(
    demo_bundle: Path, plan: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = plan(demo_bundle, "--memory", "2GiB", "--prompt", "16,100", "--check", *GIVEN)
    entry = report["budgets"][0]
    assert entry["measured"]["slots"] == entry["plan"]["slots"]
    decode, prompt = entry["comparison"]
    for row, what, foretold in (
        (decode, "decode", entry["decode"]),
        (prompt, "prefill", entry["prefill"]["16"]),
    ):
        assert row["what"] == what
        assert row["measured"] == entry["measured"][what]["tok_s"] > 0
        assert row["same_drive_off"] == pytest.approx(row["low_off"]), (
            "nothing is read: the drive does not count"
        )
        for end in ("low", "high"):
            assert row[end] == foretold[end]["tok_s"]
            assert row[f"{end}_off"] == pytest.approx(row[end] / row["measured"] - 1)
    assert main(["plan", str(demo_bundle), "--memory", "2GiB", "--prompt", "", "--check", *GIVEN]) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    assert "high off by" in table[0]
    assert "decode" in table[1]


def test_only_a_bundle_can_be_checked(refused: Callable[..., str]) -> None:
    assert "needs a bundle" in refused(CONFIG, "--memory", "2GiB", "--check", *GIVEN)


@pytest.mark.parametrize("config", [CONFIG, NEXT])
def test_a_config_is_planned_with_a_scratch_file(
    config: Path,
    plan: Callable[..., dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    small_scratch: None,
    tmp_path: Path,
) -> None:
    report = plan(config, "--dir", tmp_path, "--memory", "1GiB", "--context", "32", "--prompt", "8,4000")
    assert str(tmp_path) in report["machine"]["drive"]["source"]
    assert report["budgets"][0]["plan"]["context"] == 32
    assert set(report["budgets"][0]["prefill"]) == {"8"}, "a prompt that the context cannot hold"
    assert list(tmp_path.iterdir()) == []
    assert main(["plan", str(config), "--dir", str(tmp_path), "--context", "32"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("expert slots", "decode tok/s", "decode at 32", "GB/s", str(config)))


def test_given_rates_are_not_measured(
    plan: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("measure_drive", "measure_memory", "measure_products", "scratch_file"):
        monkeypatch.setattr(f"flashmoe.bench.plan.{name}", lambda *_: pytest.fail("measured"))
    report = plan(CONFIG, *GIVEN, "--memory", "1GiB")
    machine = report["machine"]
    assert machine["given"] == ["drive", "memory", "products"]
    rates = (machine["memory_bytes_per_second"], machine["int8_products_per_second"])
    assert (machine["drive"]["bytes_per_second"], *rates) == (2e9, 30e9, 400e9)


def test_fewer_experts_a_token_and_fewer_bits_are_faster(
    plan: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*GIVEN, "--memory", "1GiB"]
    whole, one, thin = (
        plan(CONFIG, *few, *more) for more in ([], ["--experts-per-token", "1"], ["--bits", "2"])
    )
    speed = whole["budgets"][0]["decode"]["low"]["tok_s"]
    assert one["budgets"][0]["decode"]["low"]["tok_s"] > speed
    assert thin["model"]["record_nbytes"] <= whole["model"]["record_nbytes"]
    assert thin["model"]["traffic"]["expert_nbytes"] < whole["model"]["traffic"]["expert_nbytes"]
    assert main(["plan", str(CONFIG), *few, "--experts-per-token", "1"]) == 0
    assert "lossy" in capsys.readouterr().out


def test_a_budget_that_cannot_work_names_the_smallest_that_does(
    refused: Callable[..., str], plan: Callable[..., dict[str, Any]]
) -> None:
    line = refused(CONFIG, *GIVEN, "--memory", "1MiB,2MiB")
    assert "smallest that works is --memory " in line
    smallest = line.split("--memory ")[1].split()[0]
    assert len(plan(CONFIG, *GIVEN, "--memory", smallest)["budgets"]) == 1
    mixed = plan(CONFIG, *GIVEN, "--memory", "1MiB,1GiB")
    assert (len(mixed["budgets"]), len(mixed["refused"])) == (1, 1)


def test_refusals_come_before_measurements(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flashmoe.bench.plan.measure_machine", lambda *_: pytest.fail("measured"))
    other = tmp_path / "config.json"
    other.write_text(json.dumps({"model_type": "gpt2", "hidden_size": 64}))
    assert "qwen3_5_moe" in refused(other)
    assert "qwen3_next" in refused(other)
    assert "the model has" in refused(CONFIG, "--experts-per-token", "1000")
    assert "positions" in refused(CONFIG, "--context", str(1 << 30))
    assert "5 bits" in refused(CONFIG, "--bits", "5").replace("'", "")
    assert "does not exist" in refused(tmp_path / "nowhere")
    other.write_text("{")
    assert str(other) in refused(other)


@pytest.mark.parametrize(
    "option",
    ["--memory=1GiB,x", "--memory=", "--drive=0", "--drive=nan", "--int8=-1", "--prompt=a"],
)
def test_wrong_options_are_wrong_usage(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(CONFIG), option]) == 2
    assert f"argument {option.split('=')[0]}:" in capsys.readouterr().err


class TestScratchFile:
    def test_it_has_the_size_and_goes(self, tmp_path: Path, small_scratch: None) -> None:
        with scratch_file(tmp_path, RECORD) as file:
            assert file.stat().st_size == 4 << 20
            assert file.parent == tmp_path
            rates = measure_drive([(file, (4 << 20) // RECORD)], RECORD)
        assert list(tmp_path.iterdir()) == []
        assert [reads for reads, _ in rates.batches] == list(BATCHES)
        assert min(rates.stream, rates.fill, *(seconds for _, seconds in rates.batches)) > 0
        assert rates.io in ("direct", "buffered")

    def test_it_goes_after_ctrl_c(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "flashmoe.cli", "plan", str(CONFIG), "--dir", str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            end = time.monotonic() + 60
            while not list(tmp_path.iterdir()) and process.poll() is None:
                assert time.monotonic() < end, "no scratch file"
                time.sleep(0.005)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, out, err) == (130, "", "flashmoe: interrupted\n")
        assert list(tmp_path.iterdir()) == []

    def test_a_directory_that_does_not_exist(self, refused: Callable[..., str], tmp_path: Path) -> None:
        assert refused(CONFIG, "--dir", tmp_path / "no").startswith(f"{tmp_path / 'no'} is no directory")

    def test_no_room(
        self, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine_rates, "SCRATCH_NBYTES", 1 << 60)
        line = refused(CONFIG, "--dir", tmp_path)
        assert line.startswith(f"{tmp_path}: ")
        assert "--drive" in line
        assert list(tmp_path.iterdir()) == []

    def test_a_write_that_fails(self, refused: Callable[..., str], tmp_path: Path) -> None:
        with largest_file(1 << 20):
            line = refused(CONFIG, "--dir", tmp_path)
        assert line.startswith(f"{tmp_path}: cannot write a test file (File too large)")
        assert list(tmp_path.iterdir()) == []

    def test_no_permission(
        self, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Simulated: root may write anywhere."""

        def deny(**_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("tempfile.NamedTemporaryFile", deny)
        assert refused(CONFIG, "--dir", tmp_path).startswith(f"{tmp_path}: cannot write a test file (Perm")

    def test_errors_of_the_caller_are_the_callers(self, tmp_path: Path, small_scratch: None) -> None:
        with pytest.raises(FileNotFoundError), scratch_file(tmp_path, RECORD):
            (tmp_path / "missing").read_bytes()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(ConfigError), scratch_file(tmp_path / "no", RECORD):
            pass
