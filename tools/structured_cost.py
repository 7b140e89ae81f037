"""What structured output costs per token: mask() and accept() over random JSON Schemas and a vocabulary of 248,320.

    python tools/structured_cost.py [--schemas 200] [--tokenizer tokenizer.json] [--tokens 200]

The vocabulary is the demo model's 49,152 tokens, extended by joining tokens to words of Latin letters and of seven
other scripts, as large vocabularies are; --tokenizer measures a real one.  Tokens are drawn from each mask with a
probability that falls with their id, which stands for their frequency, so no model is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import env
from flashmoe.chat.structured import GrammarVocabulary, StructuredOutput, compile_structure
from flashmoe.engine.tokenizer import TextTokenizer

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 248_320
_WARM_UP = 20  # schemas: the first masks fill tables that all later ones share
# Han, Hangul, Cyrillic, Arabic, Devanagari, Thai, Kana.
_SCRIPTS = (
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x400, 0x4FF),
    (0x600, 0x6FF),
    (0x900, 0x97F),
    (0xE00, 0xE7F),
)
_KANA = (0x3040, 0x30FF)


def main() -> int:
    """Measure and print; exit code 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=200, help="at most, of one answer")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json to measure instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(report(measure(vocabulary(args.tokenizer, Path(folder)), args.schemas, args.tokens)))
    return 0


def vocabulary(file: Path | None, folder: Path) -> GrammarVocabulary:
    """The vocabulary to measure; says what building it took."""
    if file is None:
        file = folder / "tokenizer.json"
        spec = json.loads((ROOT / "models" / "demo" / "tokenizer.json").read_text())
        file.write_text(json.dumps(extended(spec, VOCAB_SIZE)))
        (folder / "config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    tokenizer = TextTokenizer.open(file.parent)
    before, began = env.current_memory(), time.perf_counter()
    made = GrammarVocabulary(tokenizer, max(VOCAB_SIZE, tokenizer.vocab_size))
    seconds, nbytes = time.perf_counter() - began, env.current_memory() - before
    print(f"{made.vocab_size} tokens: built in {seconds:.2f} s, {nbytes / 2**20:.1f} MiB")
    return made


def extended(spec: dict[str, Any], size: int, seed: int = 0) -> dict[str, Any]:
    """A byte-level BPE of ``size`` tokens: each new one joins two others, and is a merge of them."""
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    rng, byte = random.Random(seed), _byte_tokens(spec)
    words = [token for token in vocab if token not in {added["content"] for added in spec["added_tokens"]}]

    def join(left: str, right: str) -> str:
        if left + right not in vocab and len(vocab) < size:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
        return left + right

    while len(vocab) < size:
        if rng.random() < 0.5:
            left, right = (words[int(len(words) * rng.random() ** 2)] for _ in range(2))
            if len(left + right) <= 16 and not right.startswith("Ġ"):
                join(left, right)
            continue
        low, high = rng.choice((*_SCRIPTS, _KANA))
        word = ""
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            first, *rest = (byte[b] for b in chr(rng.randint(low, high)).encode())
            for piece in rest:
                first = join(first, piece)
            word = join(word, first) if word else first
    return spec


def _byte_tokens(spec: dict[str, Any]) -> list[str]:
    """How the vocabulary writes each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


def measure(made: GrammarVocabulary, schemas: int, most: int) -> dict[str, Any]:
    """Seconds of each token's mask() and accept(), of each compilation, and of each answer's first mask."""
    module = _random_schemas()
    weights = 1.0 / (np.arange(made.vocab_size) + 50.0)
    rng = np.random.default_rng(0)
    tokens, compiles = [], []
    for seed in range(-_WARM_UP, schemas):
        form = StructuredOutput.json_schema(module.random_schema(seed % 1_000_000))
        began = time.perf_counter()
        constraint = compile_structure(form, made)
        compiled, steps = time.perf_counter() - began, []
        for _ in range(most):
            began = time.perf_counter()
            mask = constraint.mask()
            masked = time.perf_counter() - began
            token_id = _draw(mask, weights, rng)
            if token_id in made.stop_ids:
                break
            began = time.perf_counter()
            constraint.accept(token_id)
            steps.append(masked + time.perf_counter() - began)
            if constraint.is_done:
                break
        if seed >= 0:
            tokens += steps[1:]  # the first mask is part of the compilation
            compiles.append(compiled)
    return {"tokens": np.array(tokens), "compiles": np.array(compiles)}


def _draw(mask: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> int:
    ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    sums = np.cumsum(weights[ids])
    return int(ids[np.searchsorted(sums, rng.random() * sums[-1])])


def _random_schemas() -> Any:
    spec = importlib.util.spec_from_file_location("random_schemas", ROOT / "tools" / "random_schemas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(measured: dict[str, Any]) -> str:
    """Median, 99th percentile and worst in microseconds and milliseconds."""
    micros, millis = measured["tokens"] * 1e6, measured["compiles"] * 1e3
    return (
        f"mask + accept over {len(micros)} tokens of {len(millis)} schemas: median {np.median(micros):.1f} us, "
        f"p90 {np.percentile(micros, 90):.1f} us, p99 {np.percentile(micros, 99):.1f} us, worst {micros.max():.0f} us\n"
        f"compilation with the first mask: median {np.median(millis):.2f} ms, worst {millis.max():.2f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
