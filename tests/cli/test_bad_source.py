"""Conversions that cannot be finished: one line that names file and remedy, and nothing that passes for a bundle."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmoe.cli import main

Fail = Callable[..., str]
SOURCE = Path(__file__).parents[1] / "golden" / "mlx_q4"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "source"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def refused(fail: Fail, source: Path, output: Path) -> str:
    line = fail("convert", source, output)
    assert not output.exists() or list(output.iterdir()) == []
    assert "is not a flashmoe bundle" in fail("verify", output)
    assert "is not a flashmoe bundle" in fail("run", output, "Hi")
    return line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "num_attention_heads",
            0,
            r"config\.json: .*num_attention_heads is 0, must be an integer from 1",
        ),
        ("num_experts_per_tok", 5, r"num_experts_per_tok is 5, must be an integer from 1 to 4"),
        ("hidden_size", None, r"hidden_size is missing"),
        ("layer_types", ["mamba"], r"layer_types is \['mamba'\], must list"),
        (
            "vocab_size",
            10**9,
            r"model\.safetensors: tensor .* \[1000000000, 64\] wanted: check config\.json",
        ),
        ("moe_intermediate_size", 1 << 30, r"model\.safetensors: tensor .*: check config\.json"),
    ],
)
def test_odd_values(fail: Fail, source: Path, output: Path, key: str, value: object, words: str) -> None:
    config = json.loads((source / "config.json").read_text())
    config["text_config"][key] = value
    (source / "config.json").write_text(json.dumps(config))
    assert re.search(words, refused(fail, source, output))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{nope", r"config\.json is no JSON .*: download it again"),
        ("[" * 100_000, r"config\.json is no JSON .*: download it again"),
        ("[]", r"config\.json is no JSON object: download it again"),
        ("{}", r"config\.json: model_type None is not supported: use a model of type \w+, "),
        ('{"model_type": "gpt2"}', r"model_type 'gpt2' is not supported"),
        ('{"model_type": "qwen3_next"}', r"config\.json: \w+ is missing"),
    ],
)
def test_odd_configurations(fail: Fail, source: Path, output: Path, text: str, words: str) -> None:
    (source / "config.json").write_text(text)
    assert re.search(words, refused(fail, source, output))
    assert re.search(words.replace("download it again", ""), fail("inspect", source))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"model\.safetensors is damaged: .* 0-byte file; download it again"),
        (
            b"\xff" * 7 + b"\x0f{}",
            r"model\.safetensors is damaged: its header claims \d+ bytes of a 10-byte",
        ),
        (
            b"\x02" + b"\0" * 7 + b"{",
            r"model\.safetensors is damaged: its header claims 2 bytes of a 9-byte",
        ),
        (b"\x02" + b"\0" * 7 + b"{]", r"model\.safetensors is damaged: its header is no JSON"),
    ],
)
def test_broken_weights(fail: Fail, source: Path, output: Path, data: bytes, words: str) -> None:
    (source / "model.safetensors").write_bytes(data)
    assert re.search(words, refused(fail, source, output))


def test_places_that_cannot_be_written(fail: Fail, source: Path) -> None:
    config = source / "config.json"
    assert re.search(
        r"config\.json exists and is no unfinished bundle: choose", fail("convert", source, config)
    )
    assert re.search(r"cannot create .*: choose another", fail("convert", source, config / "below"))
    assert re.search(r"cannot create /proc/x .*: choose another", fail("convert", source, "/proc/x"))
    assert config.read_text() == (SOURCE / "config.json").read_text()


def test_a_bundle_is_no_source(fail: Fail, demo_bundle: Path, output: Path) -> None:
    assert fail("convert", demo_bundle, output).startswith(f"{demo_bundle} is a bundle already: run it")
    assert not output.exists()


# Mounts a small drive in a mount namespace of its own; the second argument fills it once the free space has
# been looked at, as another program may, and frees it for the second attempt.
FULL_DRIVE = """
import os, subprocess, sys
from pathlib import Path
from flashmoe.cli import main
from flashmoe.convert import writing
drive, source, nbytes = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(drive)]).returncode:
    sys.exit(77)
words, ballast, check = ["convert", source, str(drive / "bundle")], drive / "ballast", writing.UnitWriter.check_space
def fill(writer, growth, remedy):
    check(writer, growth, remedy)
    with ballast.open("wb", buffering=0) as file:
        file.write(bytes(int(nbytes) - 150_000))
writing.UnitWriter.check_space = fill
print(main(words), sorted(p.name for p in drive.rglob("*")))
print(main(["verify", words[2]]))
writing.UnitWriter.check_space = check
ballast.unlink(missing_ok=True)
print(main([*words, "--json"]))
print(main(["verify", words[2]]))
"""


def on_small_drive(tmp_path: Path, nbytes: int) -> subprocess.CompletedProcess[str]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("mounting a small drive needs root on Linux")
    (tmp_path / "drive").mkdir()
    words = [sys.executable, "-c", FULL_DRIVE, str(tmp_path / "drive"), str(SOURCE), str(nbytes)]
    command = ["unshare", "--mount", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"no drive can be mounted here: {done.stderr.strip()}")
    assert "Traceback" not in done.stderr
    return done


def test_a_drive_that_fills_up_meanwhile(tmp_path: Path) -> None:
    done = on_small_drive(tmp_path, 20 << 20)
    first, unfinished, *rest = done.stderr.splitlines()
    assert re.match(
        rf"flashmoe: error: writing {tmp_path}/drive/bundle/.*\.partial failed \(No space left on device\):"
        r" free some space .* run the same command again",
        first,
    )
    assert unfinished.startswith(f"flashmoe: error: {tmp_path}/drive/bundle is not a flashmoe bundle")
    assert rest == []
    assert done.stdout.startswith("1 ")
    assert "manifest.json" not in done.stdout
    assert '"resumed": true' in done.stdout
    assert done.stdout.rstrip().endswith("as they were written\n0")


def test_a_drive_that_is_too_small(tmp_path: Path) -> None:
    done = on_small_drive(tmp_path, 4 << 20)
    first = done.stderr.splitlines()[0]
    assert re.search(r"bundle needs 16\.\d MiB more, the drive has 4\.0 MiB free: free some, or", first)
    assert "manifest.json" not in done.stdout
    assert ".bin" not in done.stdout


INTERRUPTED = """
import os, signal, sys
from flashmoe.cli import main
from flashmoe.convert.journal import Journal
add = Journal.add
def interrupt(journal, unit, pieces):
    add(journal, unit, pieces)
    if unit != "resident":
        os.kill(os.getpid(), signal.SIGINT)
Journal.add = interrupt
sys.exit(main())
"""


def test_ctrl_c(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", INTERRUPTED, "convert", str(SOURCE), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "flashmoe: interrupted\n")
    assert not (output / "manifest.json").exists()
    for command in (["verify", str(output)], ["run", str(output), "Hi"], ["inspect", str(output)]):
        assert main(command) == 1
        assert f"{output} is not a flashmoe bundle" in capsys.readouterr().err
    assert main(["convert", str(SOURCE), str(output)]) == 0
    assert "went on where an earlier conversion was interrupted" in capsys.readouterr().out
    assert main(["verify", str(output)]) == 0
