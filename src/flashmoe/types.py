"""Byte sizes as people write them."""

from __future__ import annotations

import re

from flashmoe.errors import ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = _UNITS[_letter] = 1024**_power
_MOST = 1 << 62  # what no address reaches


def parse_size(text: str | int) -> int:
    """Bytes of ``6GiB``, ``6G`` (both 2^30), ``6GB`` (10^9), ``512MiB`` or a plain number.

    Raises ConfigError for anything else, and for sizes below one byte or beyond any address.
    """
    if isinstance(text, int):
        nbytes = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
        if match is None or match[2].lower() not in _UNITS:
            raise ConfigError(f"cannot read the size {text!r}: write it like 6GiB, 800MiB or 6000000000")
        size = float(match[1]) * _UNITS[match[2].lower()]
        nbytes = int(size) if size < _MOST else 0
    if not 0 < nbytes < _MOST:
        raise ConfigError(f"the size {text!r} is out of range: write it like 6GiB")
    return nbytes


def format_size(nbytes: int | float) -> str:
    """Bytes in the largest binary unit that keeps the number above one: ``6.00 GiB``."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
