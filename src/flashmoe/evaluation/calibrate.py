"""Calibration of a conversion: what a text says about inputs, and which parts can do with fewer bits.

Everything is written to a folder as it is found, so that a calibration that was killed goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from flashmoe.bundle.codecs import FfnLayout
from flashmoe.bundle.manifest import MANIFEST_FILE
from flashmoe.bundle.progress import Progress
from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.writer import write_whole
from flashmoe.chat.llm import LLM
from flashmoe.checkpoint import Checkpoint
from flashmoe.convert import Calibration, convert
from flashmoe.convert.bits import Bits
from flashmoe.convert.importance import Importance
from flashmoe.engine.observer import Observer
from flashmoe.errors import BundleError, ConfigError
from flashmoe.evaluation.choose_bits import Choice, Option, choose
from flashmoe.evaluation.divergence import divergence
from flashmoe.evaluation.input_squares import InputSquares
from flashmoe.evaluation.sensitivity import Sensitivity
from flashmoe.evaluation.stored_logits import StoredLogits
from flashmoe.evaluation.windows import Window, cut

WINDOW = 512
Bar = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True)
class CalibrationOptions:
    """windows: of 512 tokens whose inputs are looked at.  kl_windows: of them, those on which fewer bits are tried.

    target_nbytes: of all weights of the bundle, or target_bits: a weight, scales included; at most one of them.
    """

    text: str
    text_name: str
    windows: int = 16
    kl_windows: int = 1
    target_nbytes: int | None = None
    target_bits: float | None = None

    @property
    def text_xxh3(self) -> str:
        """The text's hash."""
        return xxhash.xxh3_64_hexdigest(self.text.encode())

    @property
    def chooses(self) -> bool:
        """True when bits are to be chosen."""
        return self.target_nbytes is not None or self.target_bits is not None


def folder_of(dst: Path) -> Path:
    """Where the calibration of a bundle in the making lies."""
    return dst.with_name(f"{dst.name}.calibration")


def calibrate(
    source: Path, dst: Path, options: CalibrationOptions, open_bundle: Callable[[Path], LLM], bar: Bar
) -> tuple[Bits | None, Calibration]:
    """Bits (None when none are to be chosen) and importances for the conversion of ``source`` to ``dst``.

    A reference bundle (the source's own codes, 8 bit for floats) is written beside ``dst`` and runs the text.  Raises
    ConfigError for a target that cannot be met, and what convert(), LLM and Engine.feed() raise.
    """
    folder = folder_of(dst)
    folder.mkdir(parents=True, exist_ok=True)
    _check_begun(folder, source, options)
    reference = folder / "reference"
    if not (reference / MANIFEST_FILE).exists():
        bits = None if _is_quantised(source) else 8
        with bar("reference bundle") as progress:
            convert(source, reference, bits=bits, progress=progress)
    facts: dict[str, Any] = {"text": options.text_name, "xxh3": options.text_xxh3}
    file = folder / "importance.safetensors"
    with open_bundle(reference) as llm:
        _check_blocks(llm.bundle)
        observer = Observer(llm.engine)
        ids = llm.tokenizer.encode(options.text, add_special_tokens=False)
        windows = list(cut(ids, WINDOW, WINDOW, llm.tokenizer.bos_id()))[: options.windows]
        facts["tokens"] = sum(len(window.ids) for window in windows)
        if not file.exists():
            _look(llm, observer, windows, file, bar)
        if not options.chooses:
            return None, Calibration(file, facts)
        choice = _choose(llm, observer, windows[: options.kl_windows], file, options, bar)
    facts |= {"estimated_kl": choice.kl, "unit_nbytes": choice.nbytes}
    return Bits(units=dict(choice.bits)), Calibration(file, facts)


def finish(dst: Path) -> None:
    """Delete the calibration of a bundle that is complete."""
    shutil.rmtree(folder_of(dst), ignore_errors=True)


def _check_begun(folder: Path, source: Path, options: CalibrationOptions) -> None:
    """The target may change between two runs; what was measured must stay what it was."""
    begun = {"source": source.resolve().name, "text": options.text_xxh3, "windows": options.windows}
    begun |= {"kl_windows": options.kl_windows}
    note = folder / "begun.json"
    if not note.exists():
        write_whole(note, json.dumps(begun).encode())
    elif json.loads(note.read_bytes()) != begun:
        raise BundleError(f"{folder} was begun with another source or text: repeat those, or delete it")


def _check_blocks(bundle: Bundle) -> None:
    """Inputs of down matrices are computed here, for silu(gate) * up without biases only."""
    codecs = [bundle.tensor(name).codec for name in bundle.tensor_names()]
    layouts = [codec for codec in codecs if isinstance(codec, FfnLayout)]
    layouts += [layer.ffn for layer in bundle.expert_layers]
    if any(layout.biased or layout.glu is not None for layout in layouts):
        raise ConfigError(
            "--calibrate does not know this model's feed-forward (clamped, with biases): leave it out"
        )


def _look(llm: LLM, observer: Observer, windows: Sequence[Window], file: Path, bar: Bar) -> None:
    observer.watcher = squares = InputSquares(llm.bundle)
    with bar("inputs of matrices") as progress:
        for i, window in enumerate(windows):
            llm.engine.start()
            llm.engine.feed(window.ids, "last")
            progress(i + 1, len(windows))
    observer.watcher = None
    squares.write(file)


def _choose(
    llm: LLM,
    observer: Observer,
    windows: Sequence[Window],
    importance: Path,
    options: CalibrationOptions,
    bar: Bar,
) -> Choice:
    sensitivity = Sensitivity(llm.bundle, Importance.open(importance))
    if (unseen := sensitivity.unseen()) is not None:
        raise ConfigError(
            f"{unseen} of this model cannot be watched yet: calibrate without a target, give --bits"
        )
    found = _measure(llm, observer, windows, sensitivity, importance.parent, bar)
    table = {
        unit.key: [
            Option(unit.bits, sensitivity.nbytes(unit, unit.bits), 0.0),
            *(
                Option(b, sensitivity.nbytes(unit, b), found[f"{unit.key}={b}"])
                for b in sensitivity.tried_bits(unit)
            ),
        ]
        for unit in sensitivity.units
    }
    weights = sum(unit.weights for unit in sensitivity.units)
    units_nbytes = sum(sensitivity.nbytes(unit, unit.bits) for unit in sensitivity.units)
    if options.target_bits is not None:
        most = int(options.target_bits * weights / 8)
    else:
        most = (options.target_nbytes or 0) - (_weights_nbytes(llm.bundle) - units_nbytes)
    if most <= 0:
        raise ConfigError(
            "the target is below what vectors, routers and the embedding need: give a larger one"
        )
    return choose(table, most)


def _measure(
    llm: LLM,
    observer: Observer,
    windows: Sequence[Window],
    sensitivity: Sensitivity,
    folder: Path,
    bar: Bar,
) -> Mapping[str, float]:
    """Mean divergence in nats by "unit=bits"; kept in a file as it grows."""
    note = folder / "sensitivity.json"
    found: dict[str, float] = json.loads(note.read_bytes()) if note.exists() else {}
    trials = [(unit, bits) for unit in sensitivity.units for bits in sensitivity.tried_bits(unit)]
    reference = StoredLogits(folder / "reference.logits", llm.engine, windows)
    with bar("trials of fewer bits") as progress:
        for i, (unit, bits) in enumerate(trials):
            key = f"{unit.key}={bits}"
            if key not in found:
                observer.set_trial(sensitivity.trial(unit, bits))
                found[key] = divergence(llm.engine, reference, windows).mean_kl
                write_whole(note, json.dumps(found).encode())
            progress(i + 1, len(trials))
    return found


def _weights_nbytes(bundle: Bundle) -> int:
    resident = bundle.resident_path.stat().st_size
    return resident + sum(layer.count * layer.record_nbytes for layer in bundle.expert_layers)


def _is_quantised(source: Path) -> bool:
    config = Checkpoint.open(source).config
    nested = config.get("text_config")
    return any(
        key in part
        for part in (config, nested if isinstance(nested, dict) else {})
        for key in ("quantization", "quantization_config")
    )
