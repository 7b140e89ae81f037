"""All 200 random schemas (`make structured`); the first 40 of them are part of `make test` too."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_is_valid(
    seed: int, valid_answer: Callable[[Any, int], Any], random_schemas: ModuleType
) -> None:
    valid_answer(random_schemas.random_schema(seed), seed)
