"""A GGUF file of a model becomes the bundle that its Hugging Face checkpoint becomes, for every family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe.bundle import Bundle
from flashmoe.convert import convert
from flashmoe.engine.engine import Engine, EngineOptions

GOLDEN = Path(__file__).parents[1] / "golden"
Config = dict[str, Any]


def plain_positions(config: Config) -> Config:
    """Llama 3's scaling is a table of frequencies in GGUF, of published sizes only (test_config.py)."""
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def all_sparse(config: Config) -> Config:
    """GGUF knows no layer without experts between those that have them."""
    return config | {"mlp_only_layers": [], "num_hidden_layers": 2}


def equal_scales(config: Config) -> Config:
    """GGUF has one of YaRN's two factors."""
    rope = config["rope_parameters"] | {"mscale": 0.8, "mscale_all_dim": 0.8}
    return config | {"rope_parameters": rope}


def unchanged(config: Config) -> Config:
    return config


Case = tuple[str, str, list[int], Callable[[Config], Config]]
# Fixture, architecture in GGUF, layers of the fixture, changes of its configuration.
FAMILIES: list[Case] = [
    ("family_mixtral", "llama", [0, 1], unchanged),
    ("family_qwen3_moe", "qwen3moe", [0, 2], all_sparse),
    ("family_olmoe", "olmoe", [0, 1], unchanged),
    ("family_glm4_moe", "glm4moe", [0, 1], unchanged),
    ("family_llama", "llama", [0, 1], plain_positions),
    ("family_qwen2", "qwen2", [0, 1], unchanged),
    ("family_qwen3", "qwen3", [0, 1], unchanged),
    ("gpt_oss_bf16", "gpt-oss", [0, 1], unchanged),
    ("gpt_oss_mxfp4", "gpt-oss", [0, 1], unchanged),
    ("deepseek_f32", "deepseek2", [0, 1], equal_scales),
]
DENSE_HYBRID: Case = ("family_qwen3_5", "qwen35", [0, 1], unchanged)
GROUPED_HYBRID: Case = ("hf_next_bf16", "qwen3next", [0, 1], all_sparse)
HYBRIDS = [DENSE_HYBRID, GROUPED_HYBRID]
IDS, HYBRID_IDS = (
    [f"{fixture}-{architecture}" for fixture, architecture, *_ in cases] for cases in (FAMILIES, HYBRIDS)
)


def both_bundles(tmp_path: Path, families: Any, forms: Any, quantized: Any, case: Case) -> tuple[Path, Path]:
    """The bundle of a fixture, with its configuration changed, and that of the same model as a GGUF file."""
    config, tensors, source = model_of(tmp_path, families, quantized, case)
    file = families.write(tmp_path / "m.gguf", case[1], config, tensors, forms)
    reports = convert(source, tmp_path / "hf"), convert(file, tmp_path / "gguf")
    assert reports[1].unknown == []
    return reports[0].path, reports[1].path


def model_of(tmp_path: Path, families: Any, quantized: Any, case: Case) -> tuple[Config, Any, Path]:
    """Configuration and tensors of a fixture, changed, and the checkpoint of that."""
    fixture, _, layers, change = case
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / fixture, source)
    config = change(json.loads((source / "config.json").read_text()))
    (source / "config.json").write_text(json.dumps(config))
    found = tensors = families.read(source)
    if config["num_hidden_layers"] != max(layers) + 1:
        tensors = families.some_layers(tensors, layers)
    if fixture == GROUPED_HYBRID[0]:
        tensors = experts_in_both_layers(tensors)
    if tensors is not found:
        for file in source.glob("*.safetensors*"):
            file.unlink()
        stored = {name: quantized.stored(values, "F32") for name, values in tensors.items()}
        quantized.write_safetensors(source / "model.safetensors", stored)
    return config, tensors, source


def experts_in_both_layers(tensors: dict[str, Any]) -> dict[str, Any]:
    """The second layer's dense block replaced by the first one's experts, turned round."""
    first, second = "model.layers.0.mlp.", "model.layers.1.mlp."
    kept = {name: values for name, values in tensors.items() if not name.startswith(second)}
    experts = {name: values for name, values in tensors.items() if name.startswith(first)}
    return kept | {
        name.replace(first, second): np.ascontiguousarray(values[..., ::-1])
        for name, values in experts.items()
    }


def weights(bundle: Path) -> dict[str, bytes]:
    """The files of weights by name."""
    found = {
        str(path.relative_to(bundle)): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.suffix in (".safetensors", ".bin")
    }
    assert found
    return found


def logits(bundle: Path) -> Any:
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 70, 40)]
    with Engine.open(bundle, EngineOptions(activations="f32")) as engine:
        return np.array(engine.logits(ids))


@pytest.mark.parametrize("case", FAMILIES, ids=IDS)
def test_gguf_and_safetensors_give_one_bundle(
    tmp_path: Path, gguf_families: Any, gguf_forms: Any, quantized_forms: Any, case: Case
) -> None:
    """The weights byte for byte, and the logits bit for bit: the two configurations mean the same model."""
    first, second = both_bundles(tmp_path, gguf_families, gguf_forms, quantized_forms, case)
    assert weights(first) == weights(second)
    assert np.array_equal(logits(first), logits(second))


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
@pytest.mark.parametrize("case", [*FAMILIES, *HYBRIDS], ids=[*IDS, *HYBRID_IDS])
def test_tensors_fused_into_one_give_the_same_bundle(
    tmp_path: Path, gguf_families: Any, gguf_forms: Any, quantized_forms: Any, case: Case, kind: str
) -> None:
    """--fuse-qkv (biases too) and --fuse-gate-up-exps: codes are taken over from rows of the whole."""
    config, tensors, _ = model_of(tmp_path, gguf_families, quantized_forms, case)
    paths = []
    for name in ("apart", "fused"):
        file = gguf_families.write(
            tmp_path / f"{name}.gguf", case[1], config, tensors, gguf_forms, block=kind, fused=name == "fused"
        )
        report = convert(file, tmp_path / name)
        assert report.unknown == []
        paths.append(report.path)
    assert weights(paths[0]) == weights(paths[1])
    assert (paths[0] / "config.json").read_bytes() == (paths[1] / "config.json").read_bytes()


def test_mxfp4_keeps_its_table(
    tmp_path: Path, gguf_families: Any, gguf_forms: Any, quantized_forms: Any
) -> None:
    case = FAMILIES[IDS.index("gpt_oss_mxfp4-gpt-oss")]
    _, bundle = both_bundles(tmp_path, gguf_families, gguf_forms, quantized_forms, case)
    layout = Bundle.open(bundle).expert_layers[0].ffn
    assert layout.gate_up.table is not None
    assert layout.down.table == layout.gate_up.table


def test_keys_and_values_in_one_matrix(
    tmp_path: Path, gguf_families: Any, gguf_forms: Any, quantized_forms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of early 2025: heads as they are, kv_b_proj whole."""
    absorbed = gguf_families.NUMBERS["deepseek2"]

    def early(config: Config) -> Config:
        made: Config = absorbed(config)
        for kind in ("key", "value"):
            made[f"attention.{kind}_length"] = made.pop(f"attention.{kind}_length_mla")
        return made | {"attention.head_count_kv": config["num_attention_heads"]}

    monkeypatch.setitem(gguf_families.MOVES, "deepseek2", gguf_families.merged)
    monkeypatch.setitem(gguf_families.NUMBERS, "deepseek2", early)
    case = FAMILIES[IDS.index("deepseek_f32-deepseek2")]
    first, second = both_bundles(tmp_path, gguf_families, gguf_forms, quantized_forms, case)
    assert (first / "resident.safetensors").read_bytes() == (second / "resident.safetensors").read_bytes()
    assert np.array_equal(logits(first), logits(second))


@pytest.mark.parametrize("case", HYBRIDS, ids=HYBRID_IDS)
def test_hybrids(
    tmp_path: Path, gguf_families: Any, gguf_forms: Any, quantized_forms: Any, case: Case
) -> None:
    """log(exp(x)) and 1 + w are rounded once more, and columns of heads of 16 leave their group of 32."""
    first, second = both_bundles(tmp_path, gguf_families, gguf_forms, quantized_forms, case)
    wanted, found = logits(first), logits(second)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
