"""Where the embedded demo model lies."""

from __future__ import annotations

from pathlib import Path

import flashmoe
from flashmoe.errors import BundleError

_INSIDE_CHECKOUT = Path("models", "demo")


def find_demo_bundle() -> Path:
    """The demo bundle beside the package's sources.  Raises BundleError outside a checkout."""
    # src/flashmoe/__init__.py of a checkout; an installed package has no models/ two levels up.
    checkout = Path(flashmoe.__file__).resolve().parents[2]
    bundle = checkout / _INSIDE_CHECKOUT
    if not (bundle / "manifest.json").is_file():
        raise BundleError(
            f"no demo model at {bundle}: run from a checkout of flashmoe, or name a bundle before the prompt"
        )
    return bundle
