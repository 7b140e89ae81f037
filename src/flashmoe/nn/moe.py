"""Sparse mixture of experts, with a shared expert or without (Shazeer et al., arXiv 1701.06538)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.errors import BundleError
from flashmoe.nn.blocks import Experts, FfnShape, Foresight
from flashmoe.nn.weights import F32, I32, Weights
from flashmoe.nn.workspace import Workspace

# Tokens of a step whose experts are computed as they land, and foretold for the next layer: sequences that are decoded
# together.  More are a prompt, and visit the experts in file order.
FEW = 16
# Results that the kernel keeps apart before it sums them: kApart of native/kernels/quant/expert_ffn.cc.
_APART = 192


@dataclass(frozen=True)
class GroupedRouting:
    """Sigmoid routing with a correction bias: see route_grouped of kernels/ops.py."""

    groups: int
    topk_groups: int
    normalise: bool
    scale: float


@dataclass(frozen=True)
class MoeShape(FfnShape):
    """Sizes of one layer.

    shared_intermediate 0: no shared expert; shared_gated: its result is weighted by a gate, else by one.
    router_biased: the router's logits have biases.  grouped: None for a softmax, over the chosen alone or, if not
    renormalised, over all experts.
    """

    hidden: int
    experts: int
    experts_per_token: int
    intermediate: int
    shared_intermediate: int
    shared_gated: bool = True
    router_biased: bool = False
    grouped: GroupedRouting | None = None
    renormalised: bool = True

    def widest(self) -> int:
        """The shared expert's rows between its products."""
        return self.shared_intermediate

    def hidden_rows(self) -> int:
        """Of the larger kind of expert."""
        return max(self.intermediate, self.shared_intermediate)

    def build(self, weights: Weights, prefix: str, layer: int, ops: Any) -> SparseMoe:
        """Router and experts."""
        return SparseMoe(weights, prefix, layer, self, ops)

    def workspace(self, tokens: int) -> int:
        """Logits, choices and weights; results of experts where they are kept apart, here and in the kernel."""
        each = self.experts + 3 * self.experts_per_token + 2 + -(-_APART * self.hidden // tokens)
        if tokens <= FEW:  # results of experts kept apart, as they land in any order
            each += (self.experts_per_token + 1) * self.hidden
        return each


@dataclass(frozen=True)
class DenseShape(FfnShape):
    """Sizes of a feed-forward block without experts."""

    hidden: int
    intermediate: int

    def widest(self) -> int:
        """Its rows between the products."""
        return self.intermediate

    def hidden_rows(self) -> int:
        """All of them."""
        return self.intermediate

    def build(self, weights: Weights, prefix: str, layer: int, ops: Any) -> DenseMlp:
        """The record."""
        return DenseMlp(weights, prefix, self, ops)


class SparseMoe:
    """One layer's router and experts."""

    def __init__(self, weights: Weights, prefix: str, layer: int, shape: MoeShape, ops: Any) -> None:
        self._layer, self._shape, self._ops = layer, shape, ops
        self._gates = [weights.matrix(prefix + "gate", shape.experts, shape.hidden, bias=shape.router_biased)]
        self._shared, self._correction = None, None
        if shape.shared_intermediate:
            self._shared = weights.ffn(prefix + "shared_expert", shape.hidden, shape.shared_intermediate)
            if shape.shared_gated:
                self._gates.append(weights.matrix(prefix + "shared_expert_gate", 1, shape.hidden))
        if shape.grouped is not None:
            self._correction = weights.vector(prefix + "gate.e_score_correction_bias", shape.experts)

    def __call__(
        self, x: F32, experts: Experts, work: Workspace, out: F32, foresight: Foresight | None = None
    ) -> None:
        """x, out: [tokens, hidden]."""
        shape, ops, tokens = self._shape, self._ops, x.shape[0]
        logits = work.get("router", (tokens, shape.experts))
        shared_weights = work.get("shared_weights", (tokens,))
        ops.linear(x, self._gates, [logits, shared_weights][: len(self._gates)], True)
        if len(self._gates) == 2:
            ops.sigmoid(shared_weights, shared_weights)
        else:
            shared_weights.fill(1)
        chosen = work.get("chosen", (tokens, shape.experts_per_token), np.int32)
        weights = work.get("weights", (tokens, shape.experts_per_token))
        self._route(logits, chosen, weights)
        experts.run(self._layer, x, chosen, weights, self._shared, shared_weights, out, foresight)

    def foresee(self, x: F32, work: Workspace) -> tuple[int, I32]:
        """This layer and the experts [tokens, k] that it would choose for x [tokens, hidden], the most probable first.

        With the input that an earlier layer had, this foretells most of what the layer will ask for: the residual
        stream changes little from one layer to the next (arXiv 2312.17238).
        """
        shape, ops, tokens = self._shape, self._ops, x.shape[0]
        logits = work.get("foreseen_router", (tokens, shape.experts))
        chosen = work.get("foreseen", (tokens, shape.experts_per_token), np.int32)
        weights = work.get("foreseen_weights", (tokens, shape.experts_per_token))
        ops.linear(x, self._gates[:1], [logits], True)
        self._route(logits, chosen, weights)
        return self._layer, chosen

    def _route(self, logits: F32, chosen: I32, weights: F32) -> None:
        """Raises BundleError when a logit is not a number: damaged weights can be finite and overflow here."""
        try:
            self._ask_router(logits, chosen, weights)
        except RuntimeError as error:
            raise BundleError(
                f"layer {self._layer}: {error}; the bundle's weights are damaged: convert the checkpoint again"
            ) from error

    def _ask_router(self, logits: F32, chosen: I32, weights: F32) -> None:
        k, how = self._shape.experts_per_token, self._shape.grouped
        if how is None:
            self._ops.route(logits, k, chosen, weights, self._shape.renormalised)
            return
        self._ops.route_grouped(
            logits,
            self._correction,
            k,
            how.groups,
            how.topk_groups,
            how.normalise,
            how.scale,
            chosen,
            weights,
        )


class DenseMlp:
    """A layer without experts: one feed-forward block for every token."""

    def __init__(self, weights: Weights, prefix: str, shape: DenseShape, ops: Any) -> None:
        self._record = weights.ffn(prefix + "dense", shape.hidden, shape.intermediate)
        self._ops, self._input = ops, ops.token_input()

    def __call__(
        self, x: F32, experts: Experts, work: Workspace, out: F32, foresight: Foresight | None = None
    ) -> None:
        """x, out: [tokens, hidden]; there is nothing to read."""
        tokens, record = x.shape[0], self._record
        rows = np.arange(tokens, dtype=np.int32)
        self._ops.prepare(self._input, x, record.group)
        shared = (self._input, record.layout, record.address)
        self._ops.expert_ffn(self._input, record.layout, [], [tokens], rows, rows, out, None, shared)
