"""Calibration of a tiny model with a tokenizer: what it sees, what it chooses, that it goes on and leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle
from flashmoe.chat.llm import LLM
from flashmoe.cli import main
from flashmoe.convert import convert
from flashmoe.convert.importance import NO_IMPORTANCE, Importance
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.observer import Observer
from flashmoe.evaluation import calibrate
from flashmoe.evaluation.divergence import divergence
from flashmoe.evaluation.input_squares import InputSquares
from flashmoe.evaluation.sensitivity import Sensitivity
from flashmoe.evaluation.stored_logits import StoredLogits
from flashmoe.evaluation.windows import Window

IDS = [(7 * i) % 40 + 1 for i in range(60)]


@pytest.fixture
def engine(source: Path, tmp_path: Path) -> Iterator[Engine]:
    bundle = convert(source, tmp_path / "reference", bits=8).path
    with Engine.open(bundle, EngineOptions(context=128, logit_rows=16)) as opened:
        yield opened


def test_watching_changes_no_bit(engine: Engine) -> None:
    before = np.array(engine.logits(IDS))
    observer = Observer(engine)
    observer.watcher = InputSquares(engine.bundle)
    assert np.array_equal(np.array(engine.logits(IDS)).view(np.uint32), before.view(np.uint32))


def test_every_matrix_has_importances_that_the_conversion_reads(engine: Engine, tmp_path: Path) -> None:
    observer = Observer(engine)
    observer.watcher = squares = InputSquares(engine.bundle)
    engine.logits(IDS)
    squares.write(tmp_path / "importance.safetensors")
    importance, bundle = Importance.open(tmp_path / "importance.safetensors"), engine.bundle
    for layer in bundle.expert_layers:
        for expert in range(layer.count):
            up = importance.reader(f"experts.{layer.layer}.{expert}.gate_up", layer.ffn.hidden)()
            down = importance.reader(f"experts.{layer.layer}.{expert}.down", layer.ffn.intermediate)()
            assert up is not None
            assert down is not None
            assert (up > 0).all(), "what an expert never saw, its layer did"
    for unit in Sensitivity(bundle, NO_IMPORTANCE).units:
        for name in unit.names:
            info = bundle.tensor(name)
            ends = ("",) if unit.key.split(".")[-1] in ("attention", "linear", "head") else (".gate_up",)
            for end in ends:
                assert importance.reader(name + end, info.cols)() is not None, name


def test_trials_of_the_same_weights_are_the_same_model(engine: Engine, tmp_path: Path) -> None:
    """A trial with fewer bits moves the predictions, without one they come back: nothing of it stays."""
    observer, windows = Observer(engine), [Window(IDS, 1)]
    sensitivity = Sensitivity(engine.bundle, NO_IMPORTANCE)
    reference = StoredLogits(tmp_path / "logits", engine, windows)
    for unit in sensitivity.units:
        found = {}
        for bits in (2, 4):
            observer.set_trial(sensitivity.trial(unit, bits))
            found[bits] = divergence(engine, reference, windows).mean_kl
            assert sensitivity.nbytes(unit, bits) < sensitivity.nbytes(unit, 8)
        assert found[2] > found[4] > 0, unit.key
        observer.set_trial(type(observer._trial)())
        assert divergence(engine, reference, windows).mean_kl == 0


def test_a_trial_is_what_the_conversion_would_give(engine: Engine, source: Path, tmp_path: Path) -> None:
    """Bytes of a trial's experts: those of a bundle converted from the 8-bit reference's own values are near."""
    bundle = engine.bundle
    sensitivity = Sensitivity(bundle, NO_IMPORTANCE)
    unit = next(unit for unit in sensitivity.units if unit.layer == 0)
    trial = sensitivity.trial(unit, 4)
    assert trial.expert is not None
    assert trial.layout is not None
    other = Bundle.open(convert(source, tmp_path / "four", bits=4).path)
    assert trial.layout == other.expert_layers[0].ffn
    mine, theirs = trial.expert(1), other.read_expert(0, 1)[: trial.layout.nbytes]
    assert np.mean(mine == theirs) > 0.5


def run_convert(source: Path, dst: Path, text: Path, *more: str) -> dict[str, Any]:
    command = [
        "convert",
        str(source),
        str(dst),
        "--calibrate",
        str(text),
        "--calibration-windows",
        "1",
        *more,
    ]
    assert main([*command, "--json"]) == 0
    manifest: dict[str, Any] = json.loads((dst / "manifest.json").read_text())
    return manifest


def test_the_command_meets_its_target_and_says_what_it_did(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i) for i in IDS) * 4, encoding="utf-8")
    plain = run_convert(source, tmp_path / "plain", text, "--bits", "3")
    assert plain["quantization"]["bits"] == "3"
    assert plain["quantization"]["calibration"]["text"] == "text.txt"
    sizes = []
    for target in ("4.5", "3.6"):
        manifest = run_convert(source, tmp_path / target, text, "--target-bits", target)
        facts = manifest["quantization"]
        assert facts["calibration"]["unit_nbytes"] > 0
        assert set(facts["bits"]["units"].values()) <= {2, 3, 4, 8}
        sizes.append(facts["calibration"]["unit_nbytes"])
        assert not (tmp_path / f"{target}.calibration").exists()
        with LLM(tmp_path / target) as llm:
            assert llm.generate([1, 2, 3], llm.sampling_params(max_tokens=2)).token_ids
    assert sizes[1] < sizes[0]
    again = run_convert(source, tmp_path / "again", text, "--target-bits", "3.6")
    assert again["tensors"] == json.loads((tmp_path / "3.6" / "manifest.json").read_text())["tensors"]
    assert main(["convert", str(source), str(tmp_path / "x"), "--target-bits", "3"]) == 1
    assert (
        main(["convert", str(source), str(tmp_path / "x"), "--calibrate", str(text), "--target-size", "1KiB"])
        == 1
    )
    assert "larger" in capsys.readouterr().err


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + i) for i in IDS) * 4, encoding="utf-8")
    return file


def stopped_after(monkeypatch: pytest.MonkeyPatch, trials: int) -> list[int]:
    """Count the trials in the list that is returned; the one after so many is interrupted."""
    seen: list[int] = []

    def counted(*arguments: Any) -> Any:
        if len(seen) == trials:
            raise KeyboardInterrupt
        seen.append(len(seen))
        return divergence(*arguments)

    monkeypatch.setattr(calibrate, "divergence", counted)
    return seen


def test_an_interrupted_calibration_measures_only_what_is_left(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        every = stopped_after(patch, 1000)
        whole = run_convert(source, tmp_path / "whole", text, "--target-bits", "3.6")
    options = ["--calibrate", str(text), "--calibration-windows", "1", "--target-bits", "3.6"]
    command = ["convert", str(source), str(tmp_path / "bundle"), *options]
    with monkeypatch.context() as patch:
        stopped_after(patch, 4)
        assert main(command) == 130
    folder = tmp_path / "bundle.calibration"
    assert len(json.loads((folder / "sensitivity.json").read_text())) == 4
    seen = (folder / "importance.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        left = stopped_after(patch, 1000)
        patch.setattr(calibrate, "finish", lambda dst: None)
        assert main(command) == 0
    assert len(left) == len(every) - 4
    assert (folder / "importance.safetensors").stat().st_mtime_ns == seen
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text()) == whole


def test_another_text_does_not_go_on(
    source: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--calibration-windows", "1", "--target-bits", "3.6", "--calibrate"]
    command = ["convert", str(source), str(tmp_path / "bundle"), *options]
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        assert main([*command, str(text)]) == 130
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "!", encoding="utf-8")
    assert main([*command, str(other)]) == 1
    assert "begun with another source or text" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_models_whose_inputs_are_not_watched_are_refused(
    with_tokenizer: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrated = ["--calibrate", str(text), "--calibration-windows", "1"]
    for form, more, word in (
        ("gpt_oss_bf16", [], "does not know this model's feed-forward"),
        ("deepseek_f32", ["--target-bits", "3.6"], "cannot be watched yet"),
    ):
        source = with_tokenizer(form)
        config = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 512}
        (source / "config.json").write_text(json.dumps(config))
        assert main(["convert", str(source), str(tmp_path / "out" / form), *calibrated, *more]) == 1
        assert word in capsys.readouterr().err
        assert not (tmp_path / "out" / form).exists()


def test_targets_need_a_text_and_stand_alone(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(source), str(tmp_path / "bundle")]
    for options, word in (
        (["--target-bits", "3"], "give --calibrate"),
        (["--calibrate", str(text), "--target-bits", "3", "--bits", "4"], "exclude each other"),
        (["--calibrate", str(text), "--target-bits", "3", "--target-size", "1MiB"], "exclude each other"),
    ):
        assert main([*command, *options]) == 1
        assert word in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
