"""What every model's config.json says, and checked look-ups in it; families add their own keys."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Self

from flashmoe.errors import ConfigError

_MAX_INT = 1 << 31
_MAX_FLOAT = 1e30  # float32 holds it, and an integer of JSON may be too long for any float
# Lists and tables grow with these before a tensor is compared with them; real models have 126 layers, heads of 256.
_MAX_LAYERS, MAX_HEAD = 1 << 12, 1 << 12


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the engine must know of any decoder.  Sizes are elements.

    A model without experts has none of them in any layer: num_experts and the two after it are 0.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    dense_layers: frozenset[int]  # those without experts

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Self:
        """Read the raw config.json.

        Raises ConfigError naming the key and the remedy for every missing, mistyped or impossible value,
        and for variants of the model that flashmoe does not compute.
        """
        raise NotImplementedError


class Fields:
    """Checked look-ups in a config object; ``prefix`` is how the user finds the key in config.json."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        text = raw.get("text_config")
        self._nested = isinstance(text, dict)
        self._table: Mapping[str, Any] = {**raw, **text} if isinstance(text, dict) else raw
        self._prefix = "text_config." if self._nested else prefix

    def get(self, key: str) -> Any:
        """The unchecked value, None when missing."""
        return self._table.get(key)

    def refuse(self, key: str, rule: str) -> NoReturn:
        """Raise the ConfigError of a key that is missing or breaks a rule."""
        value = self._table.get(key)
        found = "is missing" if value is None else f"is {reprlib.repr(value)}"
        raise ConfigError(
            f"config.json: {self._prefix}{key} {found}, {rule}: use the model's own config.json, unchanged"
        )

    def integer(self, key: str, least: int = 1, most: int = _MAX_INT) -> int:
        """A required integer."""
        value = self._table.get(key)
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"must be an integer from {least} to {most}")
        return int(value)

    def positive(self, key: str) -> float:
        """A required positive number."""
        value: Any = self._table.get(key)
        if type(value) not in (int, float) or not 0 < value <= _MAX_FLOAT:
            self.refuse(key, "must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """An optional switch."""
        value = self._table.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "must be true or false")
        return default if value is None else bool(value)

    def divisor_of(self, key: str, whole: int, whole_key: str) -> int:
        """A required integer that divides another one."""
        value = self.integer(key)
        if whole % value:
            self.refuse(key, f"must divide {whole_key} = {whole}")
        return value

    def layer_list(self, key: str) -> list[int]:
        """An optional list of layer numbers."""
        value = self._table.get(key)
        if value is not None and not (isinstance(value, list) and all(type(v) is int for v in value)):
            self.refuse(key, "must be a list of layer numbers")
        return value or []

    def token_ids(self, key: str) -> tuple[int, ...]:
        """An optional token id or list of them."""
        value = self._table.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int or token < 0 for token in ids):
            self.refuse(key, "must be a token id or a list of them")
        return tuple(ids)

    def rope(self) -> Fields:
        """The rope keys: rope_parameters where the file has it, else the top level."""
        value = self._table.get("rope_parameters")
        if value is None:
            return self
        if not isinstance(value, dict):
            self.refuse("rope_parameters", "must be an object")
        return Fields(value, f"{self._prefix}rope_parameters.")

    def nested(self, key: str) -> Fields | None:
        """An optional object of the config."""
        value = self._table.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "must be an object")
        return None if value is None else Fields(value, f"{self._prefix}{key}.")

    def first_key(self, *keys: str) -> str:
        """The first of several spellings that the file has; the first one when it has none."""
        return next((key for key in keys if self._table.get(key) is not None), keys[0])

    def layer_count(self) -> int:
        """num_hidden_layers, within what real models have."""
        return self.integer("num_hidden_layers", most=_MAX_LAYERS)

    def refuse_unless(self, key: str, *computed: Any) -> None:
        """Reject a switch that changes the mathematics; silence about it would give wrong text."""
        value = self._table.get(key)
        if value is not None and value not in computed:
            self.refuse(key, f"only {' or '.join(str(one).lower() for one in computed)} is computed")


def common_values(fields: Fields) -> dict[str, Any]:
    """The values of ModelConfig that every config.json spells alike; the experts' are the family's business."""
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_hidden_layers": fields.layer_count(),
        "rms_norm_eps": fields.positive("rms_norm_eps"),
        "max_position_embeddings": fields.integer("max_position_embeddings"),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", default=False),
        "eos_token_ids": fields.token_ids("eos_token_id"),
    }
