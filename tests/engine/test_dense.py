"""A model without experts: converted, planned, run, verified, measured; all of it resident."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from flashmoe.bench.plan import Given, forecast, measure_machine, model_work
from flashmoe.bundle.reader import Bundle
from flashmoe.bundle.verify import verify
from flashmoe.chat.llm import LLM
from flashmoe.cli import main
from flashmoe.convert import describe, synth
from flashmoe.engine.engine import Engine, EngineOptions
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.workbench import Workbench
from flashmoe.errors import BundleError, ConfigError
from flashmoe.store.slots import SlotArena

CONFIG = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    synth(folder / "config.json", folder / "bundle")
    return folder / "bundle"


def test_everything_is_resident(dense: Path) -> None:
    with Engine.open(dense, EngineOptions(threads=1)) as engine:
        assert (engine.plan.slots, engine.plan.experts, engine.plan.record_nbytes) == (0, 0, 0)
        assert engine.plan.embedding_resident
        assert "no experts" in engine.plan.describe()
        logits = np.array(engine.logits([1, 2, 3]))
        engine.start()
        pieces = np.concatenate([np.array(engine.feed([token])) for token in (1, 2, 3)])
        assert np.isfinite(logits).all()
        assert np.array_equal(pieces.view(np.uint32), logits.view(np.uint32))
        bench = Workbench(engine)
        assert bench.resident
        bench.warm()
        products, head = bench.multiply_adds()
        width = CONFIG["hidden_size"]
        assert products == 3 * (3 * width * 192 + width * (2 * width + 2 * 64))
        assert head == 320 * width


def test_it_generates_and_says_so(dense: Path) -> None:
    with LLM(dense, memory="4GiB", threads=1) as llm:
        answer = llm.generate("ab", SamplingParams(temperature=0.0, max_tokens=5))
        assert answer.stats["completion_tokens"] == 5
        assert answer.stats["bytes_read"] == 0
        assert answer.stats["hit_rate"] is None
        assert not llm.lossy
        assert llm.experts_per_token == 0


def test_experts_cannot_be_asked_for(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no experts"):
        Engine.open(dense, EngineOptions(experts_per_token=2))
    with pytest.raises(BundleError, match="no experts to spread"):
        synth(dense / "config.json", tmp_path / "striped", experts_dirs=[tmp_path / "a", tmp_path / "b"])


def test_what_is_said_of_it(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(dense)
    assert (facts["experts"], facts["expert_layers"], facts["expert_nbytes"]) == (0, 0, 0)
    assert facts["attention_layers"] == 3
    assert Bundle.open(dense).expert_layers == []
    verify(Bundle.open(dense))
    assert main(["inspect", str(dense), "--memory", "4GiB"]) == 0
    assert "a dense model, all of it always in memory" in capsys.readouterr().out


def test_its_speed_is_foretold(dense: Path) -> None:
    facts = describe(dense)
    machine, rates = measure_machine(dense, None, 0, 1, Given(memory=1e10, products=1e11))
    assert rates["drive"]["source"] == "not needed"
    work = model_work(json.loads((dense / "config.json").read_text()), facts, 0, "f16")
    with Engine.open(dense, EngineOptions(threads=1, memory_bytes=4 << 30)) as engine:
        report = forecast(machine, work, engine.plan, [64])
    low, high = report["decode"]["low"], report["decode"]["high"]
    assert low == high
    assert low["hit_rate"] == 1.0
    assert 0 < low["tok_s"] <= 1e10 / work.dense.nbytes


def test_an_arena_of_no_slots_gives_none() -> None:
    arena = SlotArena(0, 0)
    assert (arena.count, arena.free, arena.take()) == (0, 0, None)
