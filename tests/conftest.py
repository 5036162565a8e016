import os
import random

import numpy as np
import pytest
import torch


if not torch.accelerator.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton, and with it Liger, is imported
torch.set_num_threads(1)  # tiny models; the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, and can ask for the seed it came from."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
