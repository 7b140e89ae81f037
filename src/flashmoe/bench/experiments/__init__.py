"""What this field argues about, measured against the engine's default: other readers and caches behind its protocols.

One file per family; none of them is part of the product's own path.
"""
