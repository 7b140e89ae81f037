"""Whether a bundle holds exactly what its config.json asks for, before anything is allocated or read."""

from __future__ import annotations

from flashmoe.bundle.manifest import MANIFEST_FILE
from flashmoe.bundle.reader import Bundle
from flashmoe.errors import BundleError
from flashmoe.models.config import ModelConfig
from flashmoe.models.registry import ModelFamily
from flashmoe.models.spec import FfnSpec, Spec, VectorSpec


def check_fit(bundle: Bundle, family: ModelFamily, config: ModelConfig) -> None:
    """Raise BundleError when manifest and config.json speak of different models, layers or sizes."""
    if bundle.model_type != family.model_type:
        raise BundleError(
            f"{bundle.path / MANIFEST_FILE}: model_type is {bundle.model_type!r}, config.json says "
            f"{family.model_type!r}: convert the model again"
        )
    wanted = set(range(config.num_hidden_layers)) - config.dense_layers
    if {layer.layer for layer in bundle.expert_layers} != wanted:
        raise BundleError(
            f"{bundle.path / MANIFEST_FILE} does not list the experts of exactly the {len(wanted)} layers that "
            "config.json gives experts: convert the model again"
        )
    sizes = (config.num_experts, config.hidden_size, config.moe_intermediate_size)
    for layer in bundle.expert_layers:
        found = (layer.count, layer.ffn.hidden, layer.ffn.intermediate)
        if found != sizes:
            raise BundleError(
                f"{layer.path}: experts, hidden and intermediate size are {found}, config.json wants {sizes}: "
                "convert the model again"
            )
    spec = family.spec(config)
    for layer, experts in zip(bundle.expert_layers, spec.experts, strict=True):
        if (layer.ffn.glu, layer.ffn.biased) != (experts.glu, experts.biased):
            raise BundleError(
                f"{layer.path}: the experts compute {layer.ffn.glu or 'silu'}, biased {layer.ffn.biased}, config.json "
                f"wants {experts.glu or 'silu'}, biased {experts.biased}: convert the model again"
            )
    for resident in spec.resident:
        _check_tensor(bundle, resident)


def _check_tensor(bundle: Bundle, spec: Spec) -> None:
    bundle.tensor(spec.name)  # a BundleError when it is missing
    found = bundle.manifest.tensors[spec.name].shape
    if found != (wanted := _shape(spec)):
        raise BundleError(
            f"{bundle.path}: {spec.name} is {' x '.join(map(str, found))}, config.json wants {wanted}: convert again"
        )


def _shape(spec: Spec) -> tuple[int, ...]:
    """The logical shape in the manifest."""
    if isinstance(spec, VectorSpec):
        return spec.shape
    if isinstance(spec, FfnSpec):
        return spec.intermediate, spec.hidden
    return spec.source.picked_rows, spec.source.cols
