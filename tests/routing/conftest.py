"""Every routing test starts from the same random state, alone or in company."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def same_random_state():
    torch.manual_seed(0)
