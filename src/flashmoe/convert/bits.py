"""How many bits each part of a model gets: `--bits 4`, `--bits experts=4,attention=8,head=6`, or layer by layer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from flashmoe.bundle.codecs import TILE_BITS
from flashmoe.errors import ConfigError
from flashmoe.models.spec import FfnSpec, MatrixSpec

PARTS = ("experts", "shared", "dense", "attention", "linear", "head", "embedding", "router")
_WIDTHS = f"{', '.join(map(str, TILE_BITS[:-1]))} or {TILE_BITS[-1]}"
SENSITIVE_BITS = 8  # of routers and of gates of a few rows, whose error the whole layer feels
DEFAULT_BITS = 4


@dataclass(frozen=True)
class Bits:
    """Bits by part.

    uniform: of the routed experts; everything else then has 4 bits, or 8 where `uniform` is more, and routers and gates
    always 8.  parts: what was asked for by name, over `uniform`.  units: over both, of one part of one layer, by
    unit_key().  Nothing given: the source's own bits, or as uniform 4 for floats.
    """

    uniform: int | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)

    def asked(self, part: str, name: str) -> int | None:
        """What was asked for by name for a tensor of the bundle (experts: their layer's key), None for nothing."""
        key = unit_key(part, name)
        return self.units.get(key, self.parts.get(part))

    def matrix_bits(self, part: str, name: str, sensitive: bool = False) -> int:
        """Bits of a matrix made from floats."""
        asked = self.asked(part, name) if part == "router" or not sensitive else None
        if asked is not None:
            return asked
        if sensitive:
            return SENSITIVE_BITS
        return (self.uniform if part == "experts" else self.resident) or DEFAULT_BITS

    @property
    def resident(self) -> int | None:
        """What `uniform` means for matrices that are no routed experts."""
        return None if self.uniform is None else 4 if self.uniform <= 4 else 8

    def of_tied_table(self) -> str:
        """The part whose bits an embedding gets that is the output head too: that which was named.

        Raises ConfigError when both were, with different bits.
        """
        head, embedding = self.parts.get("head"), self.parts.get("embedding")
        if head is not None and embedding not in (None, head):
            raise ConfigError(
                f"--bits {self}: this model's head is its embedding, one matrix: name one of the two"
            )
        return "embedding" if head is None and embedding is not None else "head"

    def __str__(self) -> str:
        """The text that parse_bits() reads; choices of single layers are left out."""
        named = [f"{part}={bits}" for part, bits in self.parts.items()]
        return ",".join([str(self.uniform)] * (self.uniform is not None) + named)


def parse_bits(value: Bits | str | int | None) -> Bits:
    """Bits of "4", "experts=4,attention=8,head=6" or "4,head=8"; None is the source's own.

    Raises ConfigError (one line) for a part or a number of bits that does not exist.
    """
    if value is None or isinstance(value, Bits):
        return value or Bits()
    uniform: int | None = None
    parts: dict[str, int] = {}
    for item in str(value).split(","):
        part, equals, number = item.strip().partition("=")
        bits = _width(number if equals else part, str(value))
        if not equals:
            if uniform is not None:
                raise ConfigError(f"--bits {value} names two numbers for everything: name the parts")
            uniform = bits
        elif part not in PARTS:
            raise ConfigError(f"--bits {value} names {part!r}: {_remedy(part)}")
        elif part in parts:
            raise ConfigError(f"--bits {value} names {part} twice: name it once")
        else:
            parts[part] = bits
    return Bits(uniform, {part: parts[part] for part in PARTS if part in parts})


def part_of(spec: MatrixSpec | FfnSpec) -> str:
    """The part that a resident tensor belongs to."""
    if isinstance(spec, FfnSpec):
        return "shared" if ".shared_expert" in spec.name else "dense"
    if spec.name in ("lm_head", "embed_tokens"):
        return "head" if spec.name == "lm_head" else "embedding"
    if ".mlp." in spec.name:
        return "router"
    return "linear" if ".linear_attn." in spec.name else "attention"


def unit_key(part: str, name: str) -> str:
    """The key of a part in one layer: "layers.3.attention"; of what no layer has: "head"."""
    words = name.split(".")
    return f"layers.{words[1]}.{part}" if words[0] == "layers" else part


def _width(text: str, whole: str) -> int:
    if not text.isdecimal() or int(text) not in TILE_BITS:
        raise ConfigError(f"--bits {whole}: {text!r} bits are not offered: choose {_WIDTHS}")
    return int(text)


def _remedy(part: str) -> str:
    near = difflib.get_close_matches(part, PARTS, n=1)
    return f"did you mean {near[0]}?" if near else f"the parts are {', '.join(PARTS)}"
