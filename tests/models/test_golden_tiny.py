"""The engine against float32 Hugging Face logits of tiny random checkpoints, one per accepted file form.

tests/golden/make_fixtures.py made the files; golden.json says which reference belongs to which.
For gpt-oss and DeepSeek-V3 attention_families.py and its JSON do that.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions

GOLDEN = Path(__file__).parent.parent / "golden"
MODELS: dict[str, Any] = {}  # name -> its entry
FIXTURES: dict[str, Any] = {}  # form -> which model it is
ARRAYS: dict[str, str] = {}  # name of a model -> file with its logits
for index, arrays in (("golden.json", "logits.npz"), ("attention_families.json", "attention_families.npz")):
    part = json.loads((GOLDEN / index).read_text(encoding="utf-8"))
    MODELS |= part["models"]
    FIXTURES |= part["fixtures"]
    ARRAYS |= dict.fromkeys(part["models"], arrays)
FORMS = sorted(FIXTURES)

Logits = NDArray[np.float32]


def golden(form: str) -> tuple[dict[str, Any], Logits]:
    """The reference of a form: its entry and logits [tokens, vocab]."""
    name = FIXTURES[form]["model"]
    with np.load(GOLDEN / ARRAYS[name]) as logits:
        return MODELS[name], logits[name]


def open_engine(bundle: Path, prefill_chunk: int | None = None) -> Engine:
    """An engine on the float activation path."""
    return Engine.open(bundle, EngineOptions(activations="f32", prefill_chunk=prefill_chunk))


def logits_of(bundle: Path, ids: list[int], prefill_chunk: int | None = None) -> Logits:
    """Logits [tokens, vocab] of a fresh engine."""
    with open_engine(bundle, prefill_chunk) as engine:
        return np.array(engine.logits(ids))


def same_bits(a: Logits, b: Logits) -> bool:
    """Equal as bit patterns, not only as numbers."""
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def feed_in_pieces(engine: Engine, ids: list[int], sizes: list[int]) -> Logits:
    """Logits of a fresh sequence fed in pieces of the given sizes; the last size repeats."""
    engine.start()
    rows, at, step = [], 0, 0
    while at < len(ids):
        size = sizes[min(step, len(sizes) - 1)]
        rows.append(np.array(engine.feed(ids[at : at + size])))
        at, step = at + size, step + 1
    return np.concatenate(rows)


RawTensors = dict[str, tuple[dict[str, Any], bytes]]


def read_tensors(folder: Path) -> RawTensors:
    """Tensors of all safetensors files: name -> (its entry without the place, its bytes)."""
    found: RawTensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (8 + size + at for at in entry["data_offsets"])
            found[name] = {"dtype": entry["dtype"], "shape": entry["shape"]}, data[begin:end]
    return found


def write_shards(folder: Path, tensors: RawTensors, shards: int) -> None:
    """The tensors in one file, or round robin in several with an index."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = {i: f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)}
    files = files if shards > 1 else {0: "model.safetensors"}
    for i, file in files.items():
        header, data = {}, b""
        for name in names[i::shards]:
            entry, raw = tensors[name]
            header[name] = entry | {"data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    if shards > 1:
        home = {name: files[i % shards] for i, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("form", FORMS)
def test_logits_match_hugging_face(bundles: dict[str, Path], form: str) -> None:
    model, expected = golden(form)
    got = logits_of(bundles[form], model["ids"])
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= model["tolerance"]


@pytest.mark.parametrize("form", FORMS)
def test_greedy_continuation_matches(bundles: dict[str, Path], form: str) -> None:
    # No choice in the references is nearer to a tie than twice the tolerance: all must agree.
    model, _ = golden(form)
    got: list[int] = []
    with open_engine(bundles[form]) as engine:
        engine.start()
        last = engine.feed(model["ids"])[-1]
        for _ in model["greedy"]:
            got.append(int(last.argmax()))
            last = engine.feed([got[-1]])[-1]
    assert got == model["greedy"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [[1], [7], [1, 13, 2, 5], [39, 1]], ids=str)
def test_pieces_give_the_same_bits(bundles: dict[str, Path], form: str, sizes: list[int]) -> None:
    model, _ = golden(form)
    with open_engine(bundles[form]) as engine:
        whole = np.array(engine.logits(model["ids"]))
        assert same_bits(whole, feed_in_pieces(engine, model["ids"], sizes))


@pytest.mark.parametrize("form", FORMS)
def test_prefill_chunk_does_not_change_bits(bundles: dict[str, Path], form: str) -> None:
    ids = golden(form)[0]["ids"]
    assert same_bits(logits_of(bundles[form], ids), logits_of(bundles[form], ids, prefill_chunk=9))


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_within_a_ten_thousandth_of_hugging_face(bundles: dict[str, Path], form: str) -> None:
    model, expected = golden(form)
    got = logits_of(bundles[form], model["ids"])
    error = np.abs(got - expected).max() / np.abs(expected).max()
    print(f"largest error {error:.1e} of the largest logit")
    assert error <= 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_two_sequences_in_one_step_are_each_as_alone(bundles: dict[str, Path], form: str) -> None:
    first = golden(form)[0]["ids"]
    second = first[::-1][:33]
    options = EngineOptions(activations="f32", sequences=2)
    with Engine.open(bundles[form], options) as engine:
        alone = [np.array(engine.logits(ids)) for ids in (first, second)]
        one, two = engine.states
        for cut in (slice(0, 9), slice(9, 10), slice(10, 33)):
            if cut.start == 0:
                one.clear()
                two.clear()
            parts = [(one, first[cut]), (two, second[cut])]
            together = np.array(engine.step(parts, [0, 1]))
            for row, logits in zip(together, alone, strict=True):
                assert same_bits(row, logits[cut.stop - 1])


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("family_")])
def test_one_file_and_shards_give_the_same_bundle(
    bundles: dict[str, Path], form: str, tmp_path: Path
) -> None:
    """The same tensors in another number of files."""
    source = GOLDEN / form
    tensors = read_tensors(source)
    shards = 1 if len(list(source.glob("*.safetensors"))) > 1 else 3
    write_shards(tmp_path / "source", tensors, shards)
    (tmp_path / "source/config.json").write_bytes((source / "config.json").read_bytes())
    convert(tmp_path / "source", tmp_path / "bundle")
    files = [
        p.relative_to(bundles[form]) for p in bundles[form].rglob("*") if p.suffix in (".bin", ".safetensors")
    ]
    assert files
    for file in files:
        assert (tmp_path / "bundle" / file).read_bytes() == (bundles[form] / file).read_bytes()


def test_forms_of_one_model_give_the_same_bits(bundles: dict[str, Path]) -> None:
    # The three Hugging Face forms hold the same numbers, so the bundles must too.
    ids = golden("hf_text_f32")[0]["ids"]
    forms = [form for form in FORMS if FIXTURES[form]["model"] == "small"]
    assert len(forms) == 3
    first, *others = [logits_of(bundles[form], ids) for form in forms]
    assert all(same_bits(first, other) for other in others)


def test_fixtures_stay_small() -> None:
    files = [
        *GOLDEN.glob("*.json"),
        *GOLDEN.glob("*.npz"),
        *(p for f in FORMS for p in (GOLDEN / f).iterdir()),
    ]
    assert sum(p.stat().st_size for p in files) <= 5_000_000
