"""Which source shard serves which file, in what order files free shards, and deleting them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashmoe.checkpoint import Checkpoint
from flashmoe.convert.plan import Plan, layer_refs
from flashmoe.convert.units import RESIDENT_KEY, layer_key
from flashmoe.errors import BundleError, CheckpointError


class Sources:
    """The shards a conversion still needs.  ``unknown`` are original names of tensors that nothing uses."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, consume: bool) -> None:
        self._consume = consume
        refs = {RESIDENT_KEY: set(plan.resident_refs())}
        refs |= {layer_key(item.layer): layer_refs(item) for item in plan.experts}
        self._users = {key: {ref.shard for ref in used} for key, used in refs.items()}
        used_names = {ref.entry.name for used in refs.values() for ref in used}
        left = [ref for ref in checkpoint.tensors.values() if ref.entry.name not in used_names]
        self.unknown = sorted(ref.entry.name for ref in left)
        self._kept = {ref.shard for ref in left}  # deleting what we do not understand would lose it for good
        self._sizes = {checkpoint.path / name: h.file_nbytes for name, h in checkpoint.headers.items()}
        self._finished: set[str] = set()

    def layer_order(self) -> list[str]:
        """Layer files in an order that finishes with one shard before it opens the next."""
        position = {shard: i for i, shard in enumerate(self._sizes)}
        layers = [key for key in self._users if key != RESIDENT_KEY]
        return sorted(layers, key=lambda key: max((position[shard] for shard in self._users[key]), default=0))

    def require(self, key: str) -> None:
        """Raise CheckpointError when a shard that the file ``key`` is made from is gone."""
        for shard in sorted(self._users[key]):
            if not shard.exists():
                raise CheckpointError(
                    f"{shard} is missing and not wholly converted: put it back and run again"
                )

    def finished(self, key: str) -> list[Path]:
        """The file ``key`` is durable: delete the shards nothing else needs, if asked to; which they were."""
        self._finished.add(key)
        free = sorted(self._free(self._finished)) if self._consume else []
        return [shard for shard in free if _delete(shard)]

    def peak_growth(self, left: Mapping[str, int], dst: Path) -> int:
        """Most bytes by which the drive of ``dst`` fills up while ``left`` bytes of each layer are written to it."""
        grown = peak = 0
        seen: set[str] = set()
        gone: set[Path] = set()
        for key in (RESIDENT_KEY, *self.layer_order()):
            grown += left.get(key, 0)
            peak = max(peak, grown)
            seen.add(key)
            if self._consume:
                freed = {shard for shard in self._free(seen) - gone if _is_beside(shard, dst)}
                grown -= sum(self._sizes[shard] for shard in freed)
                gone |= freed
        return peak

    def _free(self, finished: set[str]) -> set[Path]:
        needed = {shard for key, shards in self._users.items() if key not in finished for shard in shards}
        return set(self._sizes) - needed - self._kept


def _is_beside(shard: Path, dst: Path) -> bool:
    """True when deleting ``shard`` gives space to ``dst``."""
    return shard.exists() and shard.stat().st_dev == dst.stat().st_dev


def _delete(shard: Path) -> bool:
    """Delete a shard and, where it is a link into a download cache, the file behind it; false when gone."""
    if not shard.exists():
        return False
    try:
        target = shard.resolve()
        shard.unlink()
        target.unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(
            f"cannot delete {shard} ({error.strerror}): make its folder writable"
            " or do without --consume-source"
        ) from error
    return True
