"""The same prompt and seed give the same bits whatever the pool, the threads, the I/O and the prefill chunk.

Golden files say what the bits should be (tests/models); here only their sameness counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.sampler import Sampler
from flashmoe.errors import ReadError

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT, NEW = 24, 8
SAMPLING = SamplingParams(temperature=1.0, top_k=40, seed=7)
SHARES = ("all", "half", "least")
CHUNKS = (None, 7, 1)  # the whole prompt at once, odd pieces, token by token
# (slots, threads, io, chunk): all pools with all threads and both kinds of reads; chunks take turns.
RUNS = [
    (share, threads, io, CHUNKS[(i + j + k) % 3])
    for i, share in enumerate(SHARES)
    for j, threads in enumerate((1, 2))
    for k, io in enumerate(("direct", "buffered"))
]
RUNS += [("least", 2, "auto", chunk) for chunk in CHUNKS]


class Output(NamedTuple):
    """What a run gives: logits [prompt + new, vocab] and the sampled ids [new]."""

    logits: NDArray[np.float32]
    ids: list[int]


def generate(bundle: Path, prompt: list[int], **options: Any) -> Output:
    """A seeded continuation, with the logits of every position."""
    try:
        engine = Engine.open(bundle, EngineOptions(context=PROMPT + NEW, **options))
    except ReadError as error:
        if options.get("io") == "direct":
            pytest.skip(f"this file system has no direct reads: {error}")
        raise
    with engine:
        rows = [np.array(engine.logits(prompt))]
        sampler, ids = Sampler(SAMPLING, prompt), []
        for _ in range(NEW):
            ids.append(sampler.sample(rows[-1][-1]))
            rows.append(np.array(engine.feed([ids[-1]])))
        assert engine.plan.slots == options["expert_slots"]
    return Output(np.concatenate(rows), ids)


def slots(share: str, bundle: Path) -> int:
    """Slots for a share of all experts; the least is one token's experts of one layer."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    config = json.loads((bundle / "config.json").read_text())
    experts = manifest["experts"]["count"] * len(manifest["experts"]["layers"])
    per_token = (config | config.get("text_config", {}))["num_experts_per_tok"]
    least = max(2, per_token)
    return {"all": experts, "half": max(least, experts // 2), "least": least}[share]


@pytest.fixture(scope="module")
def prompt(demo_bundle: Path) -> list[int]:
    """Real text in the demo model's tokens."""
    ids: list[int] = json.loads((demo_bundle / "golden.json").read_text())["long"]["ids"]
    return ids[:PROMPT]


@pytest.fixture(scope="module")
def expected(demo_bundle: Path, prompt: list[int]) -> dict[str, Output]:
    """Everything in memory, one thread, by kind of activations."""
    everything = slots("all", demo_bundle)
    return {
        kind: generate(demo_bundle, prompt, activations=kind, threads=1, expert_slots=everything)
        for kind in ("int8", "f32")
    }


def assert_same(got: Output, expected: Output) -> None:
    assert got.ids == expected.ids
    assert got.logits.dtype == np.float32
    assert got.logits.tobytes() == expected.logits.tobytes()


@pytest.mark.parametrize(("share", "threads", "io", "chunk"), RUNS)
def test_machine_options_change_no_bit(
    demo_bundle: Path,
    prompt: list[int],
    expected: dict[str, Output],
    share: str,
    threads: int,
    io: str,
    chunk: int | None,
) -> None:
    options = {"threads": threads, "io": io, "prefill_chunk": chunk}
    got = generate(demo_bundle, prompt, expert_slots=slots(share, demo_bundle), **options)
    assert_same(got, expected["int8"])


@pytest.mark.parametrize("lookahead", ["on", "off"])
def test_reading_ahead_changes_no_bit(
    demo_bundle: Path, prompt: list[int], expected: dict[str, Output], lookahead: str
) -> None:
    options = {"expert_slots": slots("half", demo_bundle), "prefill_chunk": 1, "lookahead": lookahead}
    assert_same(generate(demo_bundle, prompt, **options), expected["int8"])


@pytest.mark.parametrize("share", SHARES)
def test_nor_on_the_float_path(
    demo_bundle: Path, prompt: list[int], expected: dict[str, Output], share: str
) -> None:
    options = {"activations": "f32", "threads": 2, "io": "buffered", "prefill_chunk": 5}
    got = generate(demo_bundle, prompt, expert_slots=slots(share, demo_bundle), **options)
    assert_same(got, expected["f32"])


def test_the_comparison_can_fail(expected: dict[str, Output]) -> None:
    assert expected["int8"].logits.shape == (PROMPT + NEW, expected["int8"].logits.shape[1])
    assert expected["int8"].logits.tobytes() != expected["f32"].logits.tobytes()
    assert len({row.tobytes() for row in expected["int8"].logits}) == PROMPT + NEW


def test_a_used_engine_gives_what_a_new_one_gives(
    demo_bundle: Path, prompt: list[int], expected: dict[str, Output]
) -> None:
    with Engine.open(demo_bundle, EngineOptions(context=PROMPT + NEW, expert_slots=30)) as engine:
        engine.logits(prompt[::-1])  # leaves other experts, another state and other scratch contents behind
        list(engine.generate_ids(prompt[3:9], SamplingParams(max_tokens=5, seed=1), set()))
        assert engine.logits(prompt).tobytes() == expected["int8"].logits[:PROMPT].tobytes()
        new = list(engine.generate_ids(prompt, SamplingParams(1.0, 40, seed=7, max_tokens=NEW), set()))
        assert new == expected["int8"].ids


# hf_next_bf16: embedding rows read from the drive; mlx_mixed: tiles of several widths, records of two codecs.
@pytest.mark.parametrize("form", ["hf_next_bf16", "mlx_mixed", "mlx_g32_f16"])
def test_other_checkpoints_do_not_depend_on_memory_either(form: str, tmp_path: Path) -> None:
    bundle = convert(GOLDEN / form, tmp_path / form).path
    ids = [(7 * i) % 90 for i in range(PROMPT)]
    runs = [
        generate(bundle, ids, expert_slots=slots(share, bundle), threads=threads, io=io, prefill_chunk=chunk)
        for share, threads, io, chunk in [
            ("all", 1, "auto", None),
            ("half", 2, "buffered", 7),
            ("least", 1, "auto", 1),
            ("least", 2, "buffered", None),
        ]
    ]
    for run in runs[1:]:
        assert_same(run, runs[0])
