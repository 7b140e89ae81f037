"""convert, verify, inspect, synth and doctor on tiny checkpoints: text, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe.cli import main
from flashmoe.cli.doctor import probe_direct_io

GOLDEN = Path(__file__).parents[1] / "golden"
SOURCE = GOLDEN / "mlx_q4"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny MLX checkpoint, made once by the command."""
    path = tmp_path_factory.mktemp("cli") / "tiny"
    assert main(["convert", str(SOURCE), str(path)]) == 0
    return path


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


def test_convert_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SOURCE), str(tmp_path / "a")]) == 0
    assert "lossless" in capsys.readouterr().out
    report = run_json(capsys, "convert", str(SOURCE), str(tmp_path / "b"))
    assert (report["path"], report["lossless"], report["resumed"]) == (str(tmp_path / "b"), True, False)


def test_convert_to_other_bits_is_not_lossless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "convert", str(SOURCE), str(tmp_path / "b"), "--bits", "2")
    assert report["lossless"] is False


def test_convert_over_a_bundle_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SOURCE), str(bundle)]) == 1
    assert capsys.readouterr().err.startswith(f"flashmoe: error: {bundle}")


def test_verify_says_that_all_is_well(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle)]) == 0
    assert "as they were written" in capsys.readouterr().out
    assert run_json(capsys, "verify", str(bundle))["ok"] is True


def test_verify_finds_a_flipped_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(SOURCE), str(tmp_path / "b")]) == 0
    file = next((tmp_path / "b" / "experts").iterdir())
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "b")]) == 1
    assert capsys.readouterr().err.startswith(f"flashmoe: error: {file}: expert 0 of layer")
    assert main(["verify", str(tmp_path / "b"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], len(report["damaged"])) == (False, 1)


@pytest.mark.parametrize("arguments", [["verify"], ["inspect"], ["run"]])
def test_a_missing_bundle_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*arguments, str(tmp_path / "nowhere")] + (["Hi"] if arguments == ["run"] else [])
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("flashmoe: error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "kind"), [("", "bundle"), (str(SOURCE), "checkpoint"), (str(SOURCE / "config.json"), "config")]
)
def test_inspect_describes_all_three(
    bundle: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = name or str(bundle)
    report = run_json(capsys, "inspect", path)
    assert report["kind"] == kind
    assert report["plan"]["slots"] == report["expert_layers"] * report["experts"]
    assert main(["inspect", path]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (kind, path, "expert slots", "resident weights"))


def test_inspect_refuses_a_budget_that_cannot_work(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(bundle), "--memory", "1MiB"]) == 1
    assert "smallest that works" in capsys.readouterr().err


def test_synth_writes_a_bundle_that_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((SOURCE / "config.json").read_text())
    # synth's tokenizer needs an id for each byte and three more; the tiny checkpoint has 96.
    text_part = config.get("text_config", config)
    text_part["vocab_size"] = 320
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    report = run_json(capsys, "synth", str(file), str(tmp_path / "s"), "--layers", "2", "--router-skew", "1")
    assert report["layers"] == 2
    assert main(["verify", str(tmp_path / "s")]) == 0


def test_doctor_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_json(capsys, "doctor", str(tmp_path))
    assert set(report) == {"versions", "cpu", "memory", "drive"}
    assert report["cpu"]["isa"] in report["cpu"]["supported"]
    assert main(["doctor", str(tmp_path)]) == 0
    assert report["cpu"]["isa"] in capsys.readouterr().out


def test_doctor_wants_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert "no directory" in capsys.readouterr().err


def test_the_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    _, reason = probe_direct_io(tmp_path)
    assert reason
    assert list(tmp_path.iterdir()) == []
