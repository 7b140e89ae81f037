"""flashmoe: Mixture-of-Experts language models far larger than memory, on one modest machine, exactly.

from flashmoe import LLM, SamplingParams

with LLM("models/qwen3.5-397b", memory="6GiB") as llm:
    print(llm.generate("The capital of France is", SamplingParams(max_tokens=32)).text)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.chat.llm import LLM
    from flashmoe.chat.structured.spec import StructuredOutput
    from flashmoe.engine.params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "StructuredOutput", "__version__"]

# Loaded on first use: `flashmoe --help` must not pay for numpy, tokenizers and the native core.
_HOMES = {
    "LLM": "flashmoe.chat.llm",
    "SamplingParams": "flashmoe.engine.params",
    "StructuredOutput": "flashmoe.chat.structured.spec",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
