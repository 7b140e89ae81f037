"""Rotary positions in config.json: rope_parameters, or rope_scaling beside rope_theta as older files have it."""

from __future__ import annotations

from flashmoe.models.config import Fields
from flashmoe.nn.rope_scaling import LinearScaling, Llama3Scaling
from flashmoe.nn.rotary import Rope, RopeScaling
from flashmoe.nn.yarn import Yarn, magnitude

_LONGEST = 1 << 31


def rope_of(fields: Fields, rotated: int, default_theta: float) -> Rope:
    """The rotary positions of `rotated` values.  Raises ConfigError for a scaling that is not computed, by its name."""
    nested = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    owner = fields if nested is None or nested.get("rope_theta") is None else nested
    theta = default_theta if owner.get("rope_theta") is None else owner.positive("rope_theta")
    kind_key = "type" if nested is not None and nested.get("rope_type") is None else "rope_type"
    kind = "default" if nested is None else nested.get(kind_key)
    if kind in (None, "default"):
        return Rope(rotated, theta)
    assert nested is not None
    scaling: RopeScaling
    if kind == "linear":
        scaling = LinearScaling(nested.positive("factor"))
    elif kind == "llama3":
        scaling = _llama3(nested)
    elif kind == "yarn":
        scaling = _yarn(nested, theta)
    else:
        nested.refuse(kind_key, "only default, linear, llama3 and yarn are computed")
    return Rope(rotated, theta, scaling)


def rotated_part(fields: Fields, head_dim: int, default: float = 1.0) -> int:
    """How many values of a head turn: partial_rotary_factor of them, at the top or among the rope's keys."""
    nested = fields.nested("rope_parameters")
    owner = fields if nested is None or nested.get("partial_rotary_factor") is None else nested
    key = "partial_rotary_factor"
    rotated = int(head_dim * (default if owner.get(key) is None else owner.positive(key)))
    if rotated % 2 or not 0 < rotated <= head_dim:
        owner.refuse(key, f"must turn an even part of head_dim {head_dim}")
    return rotated


def score_factor(fields: Fields) -> float:
    """What YaRN multiplies DeepSeek's attention scores by: magnitude(factor, mscale_all_dim) squared, else 1."""
    nested = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    if nested is None or not nested.get("mscale_all_dim") or nested.get("factor") is None:
        return 1.0
    return magnitude(nested.positive("factor"), nested.positive("mscale_all_dim")) ** 2


def _llama3(fields: Fields) -> Llama3Scaling:
    low, high = fields.positive("low_freq_factor"), fields.positive("high_freq_factor")
    if high <= low:
        fields.refuse("high_freq_factor", f"must exceed low_freq_factor {low}")
    trained = fields.integer("original_max_position_embeddings", most=_LONGEST)
    return Llama3Scaling(fields.positive("factor"), low, high, trained)


def _yarn(fields: Fields, theta: float) -> Yarn:
    def number(key: str, default: float) -> float:
        return fields.positive(key) if fields.get(key) else default

    factor = fields.positive("factor")
    if fields.get("attention_factor") is not None:
        amplitude = fields.positive("attention_factor")
    elif fields.get("mscale") and fields.get("mscale_all_dim"):
        all_dim = magnitude(factor, fields.positive("mscale_all_dim"))
        amplitude = magnitude(factor, fields.positive("mscale")) / all_dim
    else:
        amplitude = magnitude(factor)
    if theta == 1:
        fields.refuse("rope_theta", "must not be 1 with yarn")
    return Yarn(
        theta=theta,
        factor=factor,
        trained=fields.integer("original_max_position_embeddings", most=_LONGEST),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=fields.boolean("truncate", default=True),
        amplitude=amplitude,
    )
