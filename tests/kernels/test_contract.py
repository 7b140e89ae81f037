"""The contract itself: every backend has every operation, and the native one refuses what does not fit."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashmoe import _native
from flashmoe.bundle.codecs import DenseCodec, FfnLayout, TileCodec
from flashmoe.errors import ConfigError
from flashmoe.kernels import reference_quant
from flashmoe.kernels.cpu import CpuOps
from flashmoe.kernels.ops import TOLERANCE, FloatOps, MatrixOps, Ops, WeightOps
from flashmoe.kernels.reference import ReferenceOps

ROOT = Path(__file__).parents[2]
F = np.float32


def operations(*protocols: type) -> dict[str, list[str]]:
    """Parameter names of every operation."""
    return {
        name: [p for p in inspect.signature(member).parameters if p != "self"]
        for protocol in protocols
        for name, member in vars(protocol).items()
        if inspect.isfunction(member) and not name.startswith("_")
    }


def stub_parameters() -> dict[str, list[str]]:
    """Parameter names of the native operations, from the stub."""
    names: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "src/flashmoe/_native.pyi").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name in ("QuantOps", "FloatOps"):
            for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
                names[method.name] = [a.arg for a in method.args.args if a.arg != "self"]
    return names


def test_backends_name_their_parameters_as_the_contract_does() -> None:
    stub, native, reference = stub_parameters(), CpuOps(1), ReferenceOps()
    for name, parameters in operations(MatrixOps, FloatOps).items():
        assert stub[name] == parameters, name
        assert list(inspect.signature(getattr(reference, name)).parameters) == parameters, name
        assert re.findall(r"(\w+): ", getattr(native, name).__doc__) == parameters, name
    for name, parameters in operations(WeightOps).items():
        for backend in (native, reference):
            assert list(inspect.signature(getattr(backend, name)).parameters) == parameters, name
    assert native.scratch_nbytes >= reference.scratch_nbytes == 0


def test_every_operation_has_a_tolerance() -> None:
    assert {key.split("/")[0] for key in TOLERANCE} == set(operations(MatrixOps, FloatOps)) - {"prepare"}


def test_the_reference_and_the_kernels_know_the_same_limits() -> None:
    header = (ROOT / "native/include/flashmoe/quant_ops.h").read_text()
    limits = dict(re.findall(r"constexpr float (kCoarse\w+) = ([\d.]+)f;", header))
    assert float(limits["kCoarseLimit"]) == reference_quant.COARSE_LIMIT
    assert float(limits["kCoarseLimitGated"]) == reference_quant.COARSE_LIMIT_GATED


def test_the_reference_stands_alone() -> None:
    code = "import flashmoe.kernels.reference, sys; print('flashmoe._native' in sys.modules)"
    assert python(code).stdout == "False\n"


def calls(ops: Ops) -> dict[str, dict[str, Any]]:
    """One valid call of every operation: T = 3 tokens."""
    x = {name: np.ones(shape, F) for name, shape in SHAPES.items()}
    codec = TileCodec(4, 64)
    layout = FfnLayout(64, 64, codec, codec)
    record = ops.ffn_weights(np.zeros(layout.nbytes, np.uint8), layout)
    source, ids = ops.token_input(), np.array([0, 1, 2], np.int32)
    ops.prepare(source, x["wide"], 64)
    attention = {name: x[name] for name in ("keys", "values", "q_gate")} | {"position": 2}
    matrix = ops.weight(np.zeros(codec.matrix_nbytes(16, 64), np.uint8), codec, 16, 64)
    return {
        "rms_norm": {"x": x["x"], "w": x["w"], "eps": 1e-6, "out": x["out"]},
        "add_rms_norm": {"x": x["x"], "delta": x["y"], "w": x["w"], "eps": 1e-6, "out": x["out"]},
        "gated_rms_norm": {"o": x["x"], "z": x["y"], "w": x["w"], "eps": 1e-6, "out": x["out"]},
        "sigmoid": {"x": x["x"], "out": x["out"]},
        "causal_conv1d": {"u": x["x"], "w": x["taps"], "states": [x["past"]], "ends": [3]}
        | {"out": x["out"]},
        "gated_delta_rule": {name: x[name] for name in ("mixed", "a", "b", "a_log", "dt_bias")}
        | {"states": [x["state"]], "ends": [3], "out": x["read"], "key_heads": 1},
        "attention_prepare": {name: x[name] for name in ("k", "v", "q_norm", "k_norm", "cos", "sin", "q_out")}
        | attention
        | {"eps": 1e-6},
        "attention": attention | {"q": x["q_out"], "out": x["mixed_heads"], "sinks": x["two"]},
        "mla_prepare": {"q": x["q_latent"], "latents": x["latents"], "norm": x["norm"], "eps": 1e-6}
        | {"cos": x["cos"], "sin": x["sin"], "interleaved": True, "position": 2}
        | {"q_out": x["absorbed"], "cache": x["keys"]},
        "mla_attention": {"q": x["absorbed"], "cache": x["keys"], "position": 2, "scale": 1.0}
        | {"out": x["attended"]},
        "route": {"logits": x["x"], "k": 2, "chosen": np.zeros((3, 2), np.int32), "weights": x["k2"]},
        "route_grouped": {"logits": x["x"], "bias": x["w"], "k": 2, "groups": 2, "topk_groups": 1}
        | {"normalise": True, "scale": 1.0, "chosen": np.zeros((3, 2), np.int32), "weights": x["k2"]},
        "combine": {"y": x["x"], "rows": ids, "weights": x["three"], "out": x["out"]},
        "embed": {"table": matrix, "ids": ids, "out": x["wide"]},
        "prepare": {"input": ops.token_input(), "x": x["wide"], "group": 64},
        "linear": {"x": x["wide"], "weights": [matrix], "outs": [x["narrow"]]},
        "logits": {"x": x["wide"], "weight": matrix, "out": x["narrow"]},
        "head_linear": {"x": x["heads"], "weight": matrix, "out": x["narrow_heads"]},
        "expert_ffn": {"input": source, "layout": record.layout, "addresses": [record.address]}
        | {"offsets": [0, 3], "tokens": ids, "rows": ids.copy(), "out": x["wide"], "weights": x["three"]},
        "routed_ffn": {"input": source, "layout": record.layout, "most_pairs": 6}
        | {"addresses": np.full(2, record.address, np.uint64), "chosen": np.eye(3, 2, dtype=np.int32)}
        | {"weights": x["k2"], "out": x["wide"]},
    }


SHAPES: dict[str, tuple[int, ...]] = {
    "x": (3, 10), "y": (3, 10), "out": (3, 10), "w": (10,), "taps": (4, 10), "past": (3, 10), "k2": (3, 2),
    "three": (3,), "wide": (3, 64), "narrow": (3, 16),
    "mixed": (3, 18), "a": (3, 2), "b": (3, 2), "a_log": (2,), "dt_bias": (2,), "state": (2, 4, 5),
    "read": (3, 2, 5),
    "q_gate": (3, 32), "k": (3, 8), "v": (3, 8), "q_norm": (8,), "k_norm": (8,), "cos": (9, 2), "sin": (9, 2),
    "q_out": (3, 2, 8), "keys": (1, 1, 256), "values": (1, 1, 256), "mixed_heads": (3, 16),
    "two": (2,), "q_latent": (3, 2, 9), "latents": (3, 16), "norm": (12,), "absorbed": (3, 2, 16),
    "attended": (3, 2, 12), "heads": (3, 1, 64), "narrow_heads": (3, 1, 16),
}  # fmt: skip


def array_arguments() -> list[tuple[str, str]]:
    every = calls(ReferenceOps()).items()
    names = [(op, name) for op, given in every for name in given if isinstance(given[name], np.ndarray)]
    return [*names, ("linear", "outs"), ("causal_conv1d", "states"), ("gated_delta_rule", "states")]


def with_damage(value: Any, how: str) -> Any:
    if isinstance(value, list):
        return [with_damage(item, how) for item in value]
    if how == "dtype":
        return value.astype(np.float64 if value.dtype == F else np.int64)
    if how == "layout":
        return np.repeat(value, 2, axis=-1)[..., ::2]
    if how == "list":
        return value.tolist()
    axis = 0 if how == "rows" else -1
    return np.concatenate([value, value.take([0], axis)], axis)  # one more


# Another number of experts, or a wider head, is as good as any: only another number of tokens is wrong.
ANY_WIDTH = {("route", "logits"), ("mla_prepare", "q"), ("mla_attention", "out")}
ANY_WIDTH |= {("head_linear", "x"), ("head_linear", "out")}
ANY_LENGTH = {("routed_ffn", "addresses")}  # records that nobody chose


@pytest.mark.parametrize(("op", "argument"), array_arguments())
def test_an_array_that_does_not_fit_is_refused(op: str, argument: str) -> None:
    ops = CpuOps(1)
    arguments = calls(ops)[op]
    getattr(ops, op)(**arguments)
    sizes = "rows" if (op, argument) in ANY_WIDTH else "columns"
    # A cache may have two dtypes, so the binding compares them, not the caster.
    dtype = ValueError if argument in ("keys", "values", "cache") else TypeError
    damages = {"dtype": dtype, "layout": TypeError, "list": TypeError}
    if (op, argument) not in ANY_LENGTH:
        damages[sizes] = ValueError
    for how, wanted in damages.items():
        bad = arguments | {argument: with_damage(arguments[argument], how)}
        with pytest.raises(wanted):
            getattr(ops, op)(**bad)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("causal_conv1d", {"w": np.ones((1, 10), F), "states": [np.ones((0, 10), F)]}),
        ("causal_conv1d", {"states": []}),
        ("causal_conv1d", {"ends": [2]}),
        ("causal_conv1d", {"ends": [4]}),
        ("causal_conv1d", {"ends": [3, 2, 3], "states": [np.ones((3, 10), F)] * 3}),
        ("causal_conv1d", {"ends": [-1, 3], "states": [np.ones((3, 10), F)] * 2}),
        ("gated_delta_rule", {"states": []}),
        ("gated_delta_rule", {"ends": [2]}),
        ("gated_delta_rule", {"ends": [1, 3], "states": [np.ones((2, 4, 5), F), np.ones((2, 4, 4), F)]}),
        ("gated_delta_rule", {"key_heads": 0}),
        ("gated_delta_rule", {"key_heads": 3}),
        ("gated_delta_rule", {"states": [np.ones((2, 3, 6), F)], "out": np.ones((3, 2, 6), F)}),
        ("gated_delta_rule", {"states": [np.ones((2, 516, 5), F)], "mixed": np.ones((3, 1042), F)}),
        ("attention_prepare", {"position": -1}),
        ("attention_prepare", {"position": 7}),
        ("attention_prepare", {"cos": np.ones((9, 5), F), "sin": np.ones((9, 5), F)}),
        ("attention_prepare", {"cos": np.ones((4, 2), F), "sin": np.ones((4, 2), F)}),
        ("attention", {"position": -1}),
        ("attention", {"position": 14}),
        ("attention", {"position": (1 << 63) - 1}),
        ("attention_prepare", {"position": (1 << 63) - 1}),
        ("attention", {"keys": np.ones((1, 1, 256), np.int16)}),
        ("attention", {"keys": np.ones((1, 1, 256), np.int32)}),
        ("attention", {"keys": np.ones((3, 1, 256), F), "values": np.ones((3, 1, 256), F)}),
        ("attention", {"values": np.ones((1, 0, 256), F)}),
        ("attention", {"values": np.ones((1, 1, 256), np.float16)}),
        ("attention", {"keys": np.ones((1, 1, 256), np.int8)}),  # without its scales
        ("attention", {"window": -1}),
        ("attention", {"q_gate": np.ones((3, 16), F)}),
        ("attention", {"sinks": np.ones(3, F)}),
        ("mla_prepare", {"position": 7}),
        ("mla_prepare", {"position": -1}),
        ("mla_prepare", {"q": np.ones((3, 2, 3), F)}),
        ("mla_prepare", {"cos": np.ones((9, 8), F), "sin": np.ones((9, 8), F)}),
        ("mla_attention", {"position": 14}),
        ("mla_attention", {"position": (1 << 63) - 1}),
        ("mla_attention", {"cache": np.ones((2, 1, 256), F)}),
        ("mla_attention", {"cache": np.ones((1, 1, 256), np.int8)}),
        ("mla_attention", {"out": np.ones((3, 2, 17), F)}),
        ("route_grouped", {"k": 6}),
        ("route_grouped", {"groups": 3}),
        ("route_grouped", {"topk_groups": 3}),
        ("route_grouped", {"topk_groups": 0}),
        ("head_linear", {"x": np.ones((3, 3, 64), F), "out": np.ones((3, 3, 16), F)}),
        ("head_linear", {"x": np.ones((3, 2, 64), F), "out": np.ones((3, 2, 16), F)}),  # 8 rows a head
        ("head_linear", {"x": np.ones((3, 1, 60), F)}),
        ("route", {"k": 0}),
        ("route", {"k": 11}),
        ("combine", {"rows": np.array([0, 3, 1], np.int32)}),
        ("combine", {"rows": np.array([0, -1, 1], np.int32)}),
        ("embed", {"ids": np.array([0, 16, 1], np.int32)}),
        ("embed", {"ids": np.array([0, -1, 1], np.int32)}),
        ("prepare", {"group": 16}),
        ("prepare", {"x": np.ones((3, 96), F)}),
        ("logits", {"x": np.ones((3, 128), F)}),
        ("logits", {"out": np.ones((3, 15), F)}),
        ("linear", {"outs": []}),
        ("linear", {"x": np.ones((3, 128), F)}),
        ("expert_ffn", {"offsets": [0]}),
        ("expert_ffn", {"offsets": [0, 2]}),
        ("expert_ffn", {"offsets": [1, 3]}),
        ("expert_ffn", {"offsets": [-1, 3]}),
        ("expert_ffn", {"addresses": [0]}),
        ("expert_ffn", {"addresses": [], "offsets": [0]}),
        ("expert_ffn", {"tokens": np.array([0, 1, 3], np.int32)}),
        ("expert_ffn", {"rows": np.array([0, 1, -1], np.int32)}),
        ("expert_ffn", {"rows": np.array([0, 1, 3], np.int32)}),
        ("routed_ffn", {"chosen": np.full((3, 2), 2, np.int32)}),
        ("routed_ffn", {"chosen": np.full((3, 2), -1, np.int32)}),
        ("routed_ffn", {"chosen": np.zeros((2, 2), np.int32)}),
        ("routed_ffn", {"chosen": np.zeros((3, 0), np.int32), "weights": np.zeros((3, 0), F)}),
        ("routed_ffn", {"addresses": np.zeros(2, np.uint64)}),
        ("routed_ffn", {"weights": np.zeros((3, 1), F)}),
        ("routed_ffn", {"out": np.zeros((2, 64), F)}),
        ("routed_ffn", {"shared_weights": np.zeros(3, F)}),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(op: str, change: dict[str, Any]) -> None:
    ops = CpuOps(1)
    with pytest.raises(ValueError, match=r"\w"):
        getattr(ops, op)(**calls(ops)[op] | change)


def test_falling_offsets_and_foreign_inputs_are_refused() -> None:
    ops = CpuOps(1)
    good = calls(ops)["expert_ffn"]
    twice = {"addresses": good["addresses"] * 2}
    with pytest.raises(ValueError, match="offsets must not fall"):
        ops.expert_ffn(**good | twice | {"offsets": [0, 4, 3]})
    narrow = ops.token_input()
    ops.prepare(narrow, np.ones((3, 64), F), 32)
    with pytest.raises(ValueError, match="another width or group"):
        ops.expert_ffn(**good | {"input": narrow})
    with pytest.raises(ValueError, match="another width or group"):
        ops.expert_ffn(**good | {"input": ops.token_input()})
    fewer = ops.token_input()
    ops.prepare(fewer, np.ones((2, 64), F), 64)
    with pytest.raises(ValueError, match="differ in tokens"):
        ops.expert_ffn(**good | {"shared": (fewer, good["layout"], good["addresses"][0])})


def test_weights_of_impossible_shapes_are_refused() -> None:
    codec, tiles = TileCodec(4, 64), np.zeros(1 << 20, np.uint8)
    ops = CpuOps(1)
    for rows, cols in ((0, 64), (16, 0), (16, 96), (17, 64), (1 << 40, 64), (16, 64 * 2049)):
        with pytest.raises(ValueError, match=r"rows|cols|size"):
            ops.weight(tiles[:576], codec, rows, cols)
    for bits, group in ((5, 64), (4, 16), (0, 64)):
        with pytest.raises(ValueError, match=r"bits|group"):
            _native.tile_weight(tiles, 16, 64, bits, group, False)
        with pytest.raises(ValueError, match=r"bits|group"):
            _native.ffn_layout(64, 64, (bits, group), (4, 64), False, False)
    for rows, cols in ((3, 5), (-1, -16), (1 << 33, 1 << 33)):
        with pytest.raises(ValueError, match=r"size|positive"):
            ops.weight(np.zeros(4, F).view(np.uint8), DenseCodec("f32"), rows, cols)
    with pytest.raises(ValueError, match="type"):
        _native.dense_weight(np.zeros(4, F), 2, 2, "f8")


def test_a_weight_keeps_its_bytes_alive() -> None:
    ops, out = CpuOps(1), np.zeros((1, 2), F)
    weight = ops.weight(np.full((2, 1000), 3, F).view(np.uint8), DenseCodec("f32"), 2, 1000)
    rubbish = [np.full((2, 1000), 9, F) for _ in range(50)]  # would take the place of freed memory
    ops.linear(np.ones((1, 1000), F), [weight], [out])
    assert out.tolist() == [[3000.0, 3000.0]]
    assert len(rubbish) == 50


def test_impossible_backends_are_refused() -> None:
    for threads in (0, -1, 1025):
        with pytest.raises(ConfigError, match="--threads"):
            CpuOps(threads)
        with pytest.raises(ValueError, match="threads"):
            _native.ThreadPool(threads)
    for make in (lambda: CpuOps(1, "int4"), lambda: ReferenceOps("int4")):
        with pytest.raises(ConfigError, match="int4"):
            make()
    with pytest.raises(ValueError, match="unknown instruction set"):
        CpuOps(1, isa="mmx")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "FLASHMOE_CPU"}
    return subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_environment_lowers_the_instruction_set(isa: str) -> None:
    code = "from flashmoe.kernels.cpu import CpuOps, explain; print(CpuOps(1).isa, explain()['reason'])"
    assert python(code, FLASHMOE_CPU=isa).stdout == f"{isa} FLASHMOE_CPU asks for it\n"


def test_without_it_the_best_is_taken() -> None:
    code = "from flashmoe.kernels.cpu import CpuOps; print(CpuOps(1).isa)"
    assert python(code).stdout == python(code, FLASHMOE_CPU="").stdout == f"{_native.supported_isas()[-1]}\n"


def test_a_wrong_instruction_set_is_one_line_that_names_the_variable() -> None:
    code = "import sys; from flashmoe.cli import main; sys.exit(main(['run', 'hello']))"
    done = python(code, FLASHMOE_CPU="sse9")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"flashmoe: error: FLASHMOE_CPU: .*'sse9'.*: choose one of scalar, .*\n", done.stderr)
