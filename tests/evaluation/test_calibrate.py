"""Calibration of a tiny model with a tokenizer: what it sees, what it chooses, that it goes on and leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from flashmoe.bundle import Bundle
from flashmoe.chat.llm import LLM
from flashmoe.cli import main
from flashmoe.convert import convert
from flashmoe.convert.importance import NO_IMPORTANCE, Importance
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.observer import Observer
from flashmoe.evaluation.divergence import divergence
from flashmoe.evaluation.input_squares import InputSquares
from flashmoe.evaluation.sensitivity import Sensitivity
from flashmoe.evaluation.stored_logits import StoredLogits
from flashmoe.evaluation.windows import Window

GOLDEN = Path(__file__).parents[1] / "golden" / "hf_text_f32"
IDS = [(7 * i) % 40 + 1 for i in range(60)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The golden float checkpoint with a tokenizer of one token a character."""
    folder = tmp_path / "source"
    folder.mkdir()
    for file in GOLDEN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:64]
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


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
