"""Which expert leaves when a slot is needed: one file per algorithm, pure bookkeeping."""

from flashmoe.store.policies.base import LayerPolicy, Policy
from flashmoe.store.policies.layered import Layered
from flashmoe.store.policies.lru import LayeredLru

__all__ = ["LayerPolicy", "Layered", "LayeredLru", "Policy"]
