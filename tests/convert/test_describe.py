"""describe() says the same of a checkpoint as of the bundle it becomes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashmoe.convert import convert, describe
from flashmoe.errors import FlashmoeError


def test_checkpoint_bundle_and_config_agree(tmp_path: Path, source: Path) -> None:
    checkpoint, config = describe(source), describe(source / "config.json")
    report = convert(source, tmp_path / "bundle")
    bundle = describe(report.path)
    kinds = [facts.pop("kind") for facts in (checkpoint, config, bundle)]
    assert kinds == ["checkpoint", "config", "bundle"]
    assert bundle == checkpoint
    assert config | {"note": bundle["note"]} == bundle
    files = sum(p.stat().st_size for p in (report.path / "experts").iterdir())
    assert bundle["expert_nbytes"] == files
    assert bundle["expert_nbytes"] == bundle["record_nbytes"] * bundle["experts"] * bundle["expert_layers"]
    assert bundle["token_expert_nbytes"] == files // bundle["experts"] * bundle["experts_per_token"]
    resident = (report.path / "resident.safetensors").stat().st_size
    assert 0.5 * resident < bundle["resident_nbytes"] + bundle["embedding_nbytes"] < resident
    assert bundle["codecs"]["4 bit, group 32"] == 8, "the down matrices of 32 columns"


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("bits", [None, 4, 3])
def test_a_config_in_mxfp4_weighs_what_its_checkpoint_does(bits: int | None) -> None:
    """Experts keep their four bits in groups of 32, unless fewer are asked for."""
    checkpoint, config = (
        describe(GOLDEN / "gpt_oss_mxfp4" / name, bits=bits) for name in ("", "config.json")
    )
    for key in ("record_nbytes", "expert_nbytes", "resident_nbytes", "codecs"):
        assert config[key] == checkpoint[key], key
    assert ("4 bit with a table, group 32" in config["codecs"]) == (bits != 3)


def test_skipped_and_unknown_tensors_are_listed(tmp_path: Path, forms: Any) -> None:
    import numpy as np

    extra = {
        "mtp.fc.weight": forms.stored(np.ones((4, 4), np.float32)),
        "odd": forms.stored(np.ones(2, np.float32)),
    }
    facts = describe(forms.write(tmp_path / "s", forms.model().hugging_face() | extra))
    assert facts["skipped"] == [{"prefix": "mtp.", "tensors": 1, "nbytes": 32}]
    assert facts["unknown"] == ["odd"]
    json.dumps(facts)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "gpt2"}', '{"model_type": ["x"]}'])
def test_useless_configs_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    with pytest.raises(FlashmoeError, match=r"config\.json"):
        describe(file)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FlashmoeError, match="nowhere"):
        describe(tmp_path / "nowhere")
