"""What several folders share: the demo bundle, a tiny tokenizer, an engine without a model."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

STATS = {
    "decode_tok_s": 8.0,
    "prefill_tok_s": 90.0,
    "bound_tok_s": 10.0,
    "hit_rate": 0.75,
    "bytes_read": 2_000_000_000,
    "peak_memory_bytes": 1 << 30,
    "budget_bytes": 2 << 30,
}
_ROOT = Path(__file__).parents[1]
_DEMO = _ROOT / "models" / "demo"


def pytest_configure() -> None:
    """A shell starts background jobs with Ctrl-C ignored; the programs that tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache directory, for the programs that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    """The committed demo bundle; its absence is a failure, because it belongs to the checkout."""
    if not (_DEMO / "manifest.json").is_file():
        pytest.fail(f"the demo bundle is missing at {_DEMO}: run `make demo-model`")
    return _DEMO


@pytest.fixture(scope="session")
def demo_llm(demo_bundle: Path) -> Iterator[Any]:
    """The demo model with all its experts in memory."""
    from flashmoe.chat.llm import LLM

    with LLM(demo_bundle, context=1024) as llm:
        yield llm


@pytest.fixture(scope="session")
def random_schemas() -> ModuleType:
    """tools/random_schemas.py."""
    return _module(_ROOT / "tools" / "random_schemas.py")


@pytest.fixture(scope="session")
def quantized_forms() -> ModuleType:
    """tests/golden/quantized_forms.py."""
    return _module(_ROOT / "tests" / "golden" / "quantized_forms.py")


@pytest.fixture(scope="session")
def gguf_forms() -> ModuleType:
    """tests/golden/gguf_forms.py."""
    return _module(_ROOT / "tests" / "golden" / "gguf_forms.py")


@pytest.fixture(scope="session")
def gguf_families() -> ModuleType:
    """tests/golden/gguf_families.py."""
    return _module(_ROOT / "tests" / "golden" / "gguf_families.py")


def _module(file: Path) -> ModuleType:
    """A Python file that is part of no package."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def valid_answer(demo_llm: Any) -> Callable[[Any, int], Any]:
    """Has the demo model answer by a schema, at temperature 1 from its whole vocabulary, and checks the answer.

    The penalties only keep a toy model from repeating a digit for ever.
    """
    from jsonschema.validators import Draft202012Validator, validator_for

    from flashmoe.chat.structured import StructuredOutput

    def answer(schema: Any, seed: int) -> Any:
        params = demo_llm.sampling_params(
            temperature=1.0, top_k=0, top_p=1.0, frequency_penalty=0.5, max_tokens=800, seed=seed
        )
        given = demo_llm.generate("JSON:", params, structured=StructuredOutput.json_schema(schema))
        assert given.finish_reason == "stop", given.text
        value = json.loads(given.text)
        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        kind(schema, format_checker=kind.FORMAT_CHECKER).validate(value)
        return value

    return answer


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    """A directory with a byte-level tokenizer: 0-255 are bytes, 256 is <|end|>, 257 <|im_end|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken("<|end|>", special=True), AddedToken("<|im_end|>", special=True)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, object], Path]:
    """Writes a value as JSON to a file of tmp_path."""

    def write(name: str, value: object) -> Path:
        file = tmp_path / name
        file.write_text(json.dumps(value), encoding="utf-8")
        return file

    return write


class ScriptedEngine:
    """Yields ``answer``; remembers the prompt and the parameters it was given."""

    def __init__(self, bundle: Any, answer: list[int]) -> None:
        self.bundle, self.answer = bundle, answer
        self.plan = SimpleNamespace(describe=lambda: "plan")
        self.finish_reason: str | None = None
        self.closed = False
        self.notice = ""
        self.options: Any = None
        self.prompt: list[int] = []
        self.params: Any = None
        self.constraint: Any = None

    def generate_ids(
        self, prompt: list[int], params: Any, stop_ids: set[int], constraint: Any = None
    ) -> Iterator[int]:
        self.prompt, self.params, self.finish_reason, self.constraint = prompt, params, None, constraint
        for token_id in self.answer:
            if token_id in stop_ids:
                self.finish_reason = "stop"
                return
            yield token_id
        self.finish_reason = "length"

    def stats(self) -> dict[str, Any]:
        return dict(STATS)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def engine(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    """The engine that every LLM of the test gets."""
    from flashmoe.chat import llm as llm_module  # here: only these tests need the whole package

    config = json.loads((_DEMO / "config.json").read_text()) | {"num_experts_per_tok": 4, "vocab_size": 320}
    bundle = SimpleNamespace(
        path=tokenizer_dir,
        config=config,
        text_config=config,
        generation_config={"temperature": 0.6, "top_k": 20},
        expert_layers=[SimpleNamespace(count=8), SimpleNamespace(count=8)],
    )
    scripted = ScriptedEngine(bundle, [])

    def open_engine(path: Path, options: Any) -> ScriptedEngine:
        scripted.options = options
        return scripted

    monkeypatch.setattr(llm_module.Bundle, "open", lambda path, experts_dirs=(): bundle)
    monkeypatch.setattr(llm_module.Engine, "open", open_engine)
    return scripted


@pytest.fixture
def llm(engine: ScriptedEngine) -> Any:
    """A model that says what ``engine.answer`` holds."""
    from flashmoe.chat.llm import LLM

    return LLM(engine.bundle.path)
