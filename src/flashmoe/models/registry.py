"""model_type -> model family, found lazily so that looking one up imports no other."""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.errors import ConfigError
from flashmoe.models.architecture import Architecture
from flashmoe.models.config import ModelConfig
from flashmoe.models.spec import ModelSpec


@dataclass(frozen=True)
class ModelFamily:
    """A family of models: what the manifest records as ``model_type``, and the module of this package that holds

    its ``Config`` (a ModelConfig), ``model_spec(config)`` (the tensors) and ``layers(config)`` (the blocks).
    """

    model_type: str
    module: str

    def config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """Check config.json; raises ConfigError."""
        config = self._import().Config.from_dict(raw)
        assert isinstance(config, ModelConfig)
        return config

    def spec(self, config: ModelConfig) -> ModelSpec:
        """The tensors of the model."""
        spec = self._import().model_spec(config)
        assert isinstance(spec, ModelSpec)
        return spec

    def architecture(self, config: ModelConfig) -> Architecture:
        """The blocks of the model."""
        return Architecture(config, self._import().layers(config))

    def _import(self) -> Any:
        return importlib.import_module(f"flashmoe.models.{self.module}")


_QWEN35 = ModelFamily("qwen3_5_moe", "qwen3_5_moe")
_QWEN35_DENSE = ModelFamily("qwen3_5", "qwen3_5_moe")
FAMILIES = {
    "qwen3_5_moe": _QWEN35,
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_5": _QWEN35_DENSE,
    "qwen3_5_text": _QWEN35_DENSE,
    "qwen3_next": ModelFamily("qwen3_next", "qwen3_next"),
    "gpt_oss": ModelFamily("gpt_oss", "gpt_oss"),
    "deepseek_v3": ModelFamily("deepseek_v3", "deepseek_v3"),
    "qwen3_moe": ModelFamily("qwen3_moe", "qwen3_moe"),
    "mixtral": ModelFamily("mixtral", "mixtral"),
    "olmoe": ModelFamily("olmoe", "olmoe"),
    "glm4_moe": ModelFamily("glm4_moe", "glm4_moe"),
    "qwen3": ModelFamily("qwen3", "qwen3"),
    "qwen2": ModelFamily("qwen2", "qwen2"),
    "llama": ModelFamily("llama", "llama"),
}


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
