"""Live comparison with Hugging Face transformers; `make oracle` runs it in an environment that has torch."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

# The fixtures' own modules: the same weights, file forms and reference model, with other seeds and shapes.
sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def _quiet_and_repeatable() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
