import random

import numpy as np
import pytest
import torch


torch.set_num_threads(1)  # tiny models; the workers of pytest-xdist share the cores


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, and can ask for the seed it came from."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
