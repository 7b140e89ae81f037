"""What the engine asks of whoever limits the tokens of an answer."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """Says which tokens may come next, in one answer.  Not thread-safe.

    The engine calls accept() as soon as a token is chosen and mask() only when the next logits are there, so that an
    implementation may compute the mask on another thread during the forward pass.
    """

    def mask(self) -> NDArray[np.uint32]:
        """One bit for each token, set where it may come next: [ceil(vocab / 32)] words, the lowest bit first.

        A stop token's bit is set where the answer may end.  Valid until the next call.
        """

    def accept(self, token_id: int) -> None:
        """Append a token that mask() allowed and that is no stop token."""

    @property
    def is_done(self) -> bool:
        """True when nothing but a stop token may come: the answer is complete."""
