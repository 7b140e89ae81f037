"""What a user can get wrong or a machine can break: one line that names it and the remedy, and nothing half-made."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from flashmoe.cli import main

Fail = Callable[..., str]
Change = Callable[[Path], None]


@pytest.fixture
def bundle(demo_bundle: Path, tmp_path: Path) -> Path:
    """The demo bundle as links to its files; the functions below give it files of its own where they differ."""
    folder = tmp_path / "demo"
    shutil.copytree(demo_bundle, folder, copy_function=os.symlink)
    return folder


def replace(file: Path, data: bytes) -> None:
    """Other content, and never through a link."""
    file.unlink(missing_ok=True)
    file.write_bytes(data)


def rewrite(file: Path, data: bytes) -> None:
    """Other content of which the manifest knows, so that only the content can be found wrong."""
    replace(file, data)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"][file.name] = {"nbytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
    replace(file.parent / "manifest.json", json.dumps(manifest).encode())


def removed(name: str) -> Change:
    return lambda bundle: (bundle / name).unlink()


def cut(name: str) -> Change:
    return lambda bundle: replace(bundle / name, (bundle / name).read_bytes()[:1000])


def holding(name: str, content: bytes) -> Change:
    return lambda bundle: rewrite(bundle / name, content)


def forgotten(name: str) -> Change:
    """A file that the source did not have either."""

    def change(bundle: Path) -> None:
        edit_manifest(bundle, lambda manifest: manifest["files"].pop(name))
        (bundle / name).unlink()

    return change


def edit_manifest(bundle: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    edit(manifest)
    replace(bundle / "manifest.json", json.dumps(manifest).encode())


def manifest_with(**values: object) -> Change:
    return lambda bundle: edit_manifest(bundle, lambda manifest: manifest.update(values))


def config_with(**values: object) -> Change:
    """config.json with other values; None takes one out."""

    def change(bundle: Path) -> None:
        config = json.loads((bundle / "config.json").read_text()) | values
        kept = {key: value for key, value in config.items() if value is not None}
        rewrite(bundle / "config.json", json.dumps(kept).encode())

    return change


def without_layer(number: int) -> Change:
    return lambda bundle: edit_manifest(bundle, lambda manifest: manifest["experts"]["layers"].pop(number))


CONVERT_AGAIN = r"convert (it|the model) again"
# (what is wrong, how, what the line says): found by every command that opens a bundle
BROKEN: list[tuple[str, Change, str]] = [
    ("expert file gone", removed("experts/layer-003.bin"), r"layer-003\.bin cannot be opened \(No such"),
    ("expert file cut", cut("experts/layer-003.bin"), r"layer-003\.bin has 1000 bytes, not \d+: copy the"),
    ("resident file gone", removed("resident.safetensors"), r"resident\.safetensors cannot be opened"),
    ("resident file cut", cut("resident.safetensors"), r"resident\.safetensors .* 1000-byte file"),
    ("tokenizer gone", removed("tokenizer.json"), r"tokenizer\.json cannot be opened \(No such"),
    ("manifest gone", removed("manifest.json"), r"demo is not a flashmoe bundle \(manifest\.json: No such"),
    ("manifest cut", cut("manifest.json"), r"manifest\.json is no JSON"),
    (
        "manifest of a later version",
        manifest_with(format_version=4),
        r"format_version is 4, this .* reads 1 to 3",
    ),
    (
        "manifest of something else",
        manifest_with(format="zip"),
        r"manifest\.json: format is 'zip'.*no flashmoe",
    ),
    (
        "config edited",
        lambda b: replace(b / "config.json", b"{}"),
        r"config\.json has 2 bytes, not \d+: copy",
    ),
    ("config no object", holding("config.json", b"[]"), r"config\.json is no JSON object: copy it from the"),
    ("config no JSON", holding("config.json", b"{nope"), r"config\.json cannot be read .*: copy it from the"),
]
# found when the model is built
UNFIT: list[tuple[str, Change, str]] = [
    (
        "unknown model",
        config_with(model_type="gpt2"),
        r"config\.json: model_type 'gpt2' is not supported: use",
    ),
    ("another model", manifest_with(model_type="qwen3_next"), r"manifest\.json: model_type is 'qwen3_next'"),
    ("experts of a layer missing", without_layer(7), r"manifest\.json does not list the experts of exactly"),
    (
        "no heads",
        config_with(num_attention_heads=0),
        r"config\.json: num_attention_heads is 0, must be .*: use",
    ),
    (
        "too many experts per token",
        config_with(num_experts_per_tok=9),
        r"num_experts_per_tok is 9, must .* to 8",
    ),
    ("a key missing", config_with(hidden_size=None), r"config\.json: hidden_size is missing, must be"),
    ("a word for a number", config_with(hidden_size="big"), r"config\.json: hidden_size is 'big', must be"),
    ("negative epsilon", config_with(rms_norm_eps=-1), r"rms_norm_eps is -1, must be a positive number: use"),
    (
        "scaled positions",
        config_with(rope_scaling={"type": "yarn"}),
        r"rope_scaling .* only unscaled positions",
    ),
    (
        "more experts",
        config_with(num_experts=16),
        r"layer-000\.bin: .* \(8, 576, 64\), .* wants \(16, 576, 64\)",
    ),
    ("wider experts", config_with(moe_intermediate_size=128), r"\(8, 576, 64\), .* wants \(8, 576, 128\)"),
    (
        "larger vocabulary",
        config_with(vocab_size=50_000),
        r"embed_tokens is 49152 x 576, .* wants \(50000, 576\)",
    ),
    (
        "tokenizer never there",
        forgotten("tokenizer.json"),
        r"tokenizer\.json is missing: copy it from the source",
    ),
    (
        "tokenizer damaged",
        holding("tokenizer.json", b"{}"),
        r"tokenizer\.json is damaged .*: copy it from the",
    ),
    ("no chat template", forgotten("chat_template.jinja"), r"no chat_template\.jinja: copy it .* or .*--raw"),
    (
        "odd stop token",
        config_with(eos_token_id="</s>"),
        r"eos_token_id '</s>' is neither a number .*: correct it",
    ),
    (
        "sampling out of range",
        holding("generation_config.json", b'{"temperature": -1}'),
        r"generation_config\.json: temperature must lie in .*: correct it",
    ),
    (
        "sampling of another type",
        holding("generation_config.json", b'{"top_k": 1.5}'),
        r"generation_config\.json: top_k must be a whole number .*: correct it",
    ),
]


def cases(table: list[tuple[str, Change, str]]) -> Any:
    return pytest.mark.parametrize(
        ("change", "words"), [case[1:] for case in table], ids=[case[0] for case in table]
    )


@pytest.mark.parametrize("command", ["run", "verify", "inspect"])
@cases(BROKEN)
def test_a_broken_bundle_is_opened_by_no_command(
    fail: Fail, bundle: Path, change: Change, words: str, command: str
) -> None:
    change(bundle)
    line = fail(command, bundle, *(["Hi"] if command == "run" else []))
    assert re.search(words, line)
    assert str(bundle) in line
    assert re.search(rf"{CONVERT_AGAIN}|copy it|another flashmoe|flashmoe convert|no flashmoe bundle", line)


@cases(UNFIT)
def test_a_bundle_that_does_not_fit_together_is_refused(
    fail: Fail, bundle: Path, change: Change, words: str
) -> None:
    change(bundle)
    assert re.search(words, fail("run", bundle, "Hi", "--max-tokens", 1, "--context", 64))


def test_verify_names_file_layer_and_expert(fail: Fail, bundle: Path, demo_bundle: Path) -> None:
    file = bundle / "experts" / "layer-019.bin"
    data = bytearray(file.read_bytes())
    record = len(data) // 8
    data[5 * record + 12345] ^= 4
    replace(file, bytes(data))
    line = fail("verify", bundle)
    assert line.startswith(f"{file}: expert 5 of layer 19 at byte {5 * record} ({record} bytes): ")
    assert line.endswith("copy or convert it again")
    assert (demo_bundle / "experts" / "layer-019.bin").read_bytes() != file.read_bytes()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["hello " * 100, "--context", "32"],
            r"the prompt has 1\d\d tokens .* holds 32: shorten it or raise --con",
        ),
        (["", "--raw"], r"the prompt is empty: give at least one token"),
        (["Hi \udcff"], r"the prompt is no valid text .*'\\udcff'.*: give it in UTF-8"),
        (["Hi", "--memory", "20MiB"], r"20\.0 MiB is too small: the smallest that works is --memory \d+MiB"),
        (
            ["Hi", "--expert-slots", "3"],
            r"3 expert slots cannot hold one step's 4 .*: raise --memory or --expert-",
        ),
        (["Hi", "--context", "9999"], r"--context 9999 is longer than the model's 8192 positions"),
        (["Hi", "--experts-per-token", "9"], r"--experts-per-token 9: the model has 8 experts"),
        (["Hi", "--threads", "5000"], r"--threads must be between 1 and 1024"),
        (["Hi", "--temperature", "-1"], r"temperature must lie in \[0, 100\], got -1"),
        (["Hi", "--top-p", "0"], r"top_p must lie in \(0, 1\], got 0"),
        (["Hi", "--top-k", "9" * 30], r"top_k must be a whole number"),
        (["Hi", "--seed", "9" * 30], r"seed must be between 0 and 2\^64 - 1"),
    ],
)
def test_impossible_wishes(fail: Fail, demo_bundle: Path, words: list[str], line: str) -> None:
    assert re.search(line, fail("run", demo_bundle, *words))


def test_a_prompt_on_stdin_that_is_no_text(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hi \xff"), encoding="utf-8"))
    assert fail("run", "-") == "the prompt on stdin is no utf-8 text: give it in UTF-8"


@pytest.mark.parametrize("size", ["0GiB", "9" * 400 + "GiB", "six", "-1"])
def test_odd_sizes_are_wrong_usage(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "Hi", f"--memory={size}"]) == 2
    assert "argument --memory:" in capsys.readouterr().err


class TestWhileRunning:
    """Trouble in the middle of an answer, with the real command."""

    def start(self, bundle: Path) -> subprocess.Popen[bytes]:
        """An endless answer whose first word is out; its experts are read for every token."""
        command = [sys.executable, "-m", "flashmoe.cli", "run", str(bundle), "Once upon a time", "--raw"]
        command += ["--expert-slots", "4", "--max-tokens", "8000", "--presence-penalty", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        assert process.stdout is not None
        assert process.stdout.read(1)
        return process

    def end(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert out.endswith(b"\n"), "the terminal's next line is not the answer's"
        assert b"Traceback" not in err
        return process.returncode, err.decode()

    def test_ctrl_c(self, demo_bundle: Path) -> None:
        process = self.start(demo_bundle)
        process.send_signal(signal.SIGINT)
        assert self.end(process) == (130, "flashmoe: interrupted\n")

    def test_expert_files_that_are_cut_are_an_error_and_never_skipped(
        self, demo_bundle: Path, tmp_path: Path
    ) -> None:
        bundle = tmp_path / "own"
        shutil.copytree(demo_bundle, bundle)  # no links: these files are cut in place
        process = self.start(bundle)
        for file in (bundle / "experts").iterdir():
            os.truncate(file, 0)
        code, err = self.end(process)
        assert code == 1
        assert re.fullmatch(
            rf"flashmoe: error: layer (\d+), expert (\d+): cannot read {bundle}/experts/layer-0*\1\.bin"
            r" at byte \d+: the file ends after 0 of \d+ bytes: run `flashmoe verify` on the bundle\n",
            err,
        )

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
    @pytest.mark.parametrize(
        "words",
        [["run", "Hi", "--max-tokens", "2"], ["run", "Hi", "--max-tokens", "2", "--json"], ["--help"]],
    )
    def test_an_output_that_cannot_be_written(self, words: list[str]) -> None:
        command = [sys.executable, "-m", "flashmoe.cli", *words]
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            "flashmoe: error: cannot write the output (No space left on device): "
            "free some space or send it elsewhere\n"
        )
