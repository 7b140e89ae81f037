"""model_type -> model family, found lazily so that looking one up imports no other."""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.errors import ConfigError
from flashmoe.models.qwen3_5_config import Qwen35Config
from flashmoe.models.spec import ModelSpec


@dataclass(frozen=True)
class ModelFamily:
    """A family of models that one forward pass computes.

    ``model_type`` is what the manifest records; ``names`` is the module of its name map and ``decoder`` the
    forward pass as "module:Class".
    """

    model_type: str
    names: str
    decoder: str

    def config(self, raw: Mapping[str, Any]) -> Qwen35Config:
        """Check config.json; raises ConfigError."""
        return Qwen35Config.from_dict(raw)

    def spec(self, config: Qwen35Config) -> ModelSpec:
        """The tensors of the model."""
        spec = importlib.import_module(self.names).model_spec(config)
        assert isinstance(spec, ModelSpec)
        return spec

    def decoder_class(self) -> Any:
        """The class of the forward pass (imports the kernels)."""
        module, name = self.decoder.split(":")
        return getattr(importlib.import_module(module), name)


_QWEN35 = ModelFamily("qwen3_5_moe", "flashmoe.models.qwen3_5_names", "flashmoe.models.qwen3_5_moe:Qwen35Moe")
_QWEN_NEXT = ModelFamily(
    "qwen3_next", "flashmoe.models.qwen3_next_names", "flashmoe.models.qwen3_5_moe:Qwen35Moe"
)
FAMILIES = {"qwen3_5_moe": _QWEN35, "qwen3_5_moe_text": _QWEN35, "qwen3_next": _QWEN_NEXT}


def find_family(raw: Mapping[str, Any]) -> ModelFamily:
    """The family of a raw config.json; raises ConfigError when flashmoe does not run its model_type."""
    model_type = raw.get("model_type")
    text = raw.get("text_config")
    for candidate in (model_type, text.get("model_type") if isinstance(text, dict) else None):
        if isinstance(candidate, str) and candidate in FAMILIES:
            return FAMILIES[candidate]
    known = ", ".join(sorted(FAMILIES))
    raise ConfigError(
        f"config.json: model_type {reprlib.repr(model_type)} is not supported: use a model of type {known}"
    )
