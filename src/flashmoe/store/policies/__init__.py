"""Which expert leaves when a slot is needed: one file per algorithm, pure bookkeeping."""

from flashmoe.store.policies.base import Policy
from flashmoe.store.policies.lru import LayeredLru

__all__ = ["LayeredLru", "Policy"]
