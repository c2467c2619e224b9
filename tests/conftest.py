from __future__ import annotations

import os
from collections.abc import Iterator

import matplotlib as mpl
import pytest
import torch

mpl.use("Agg")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded images of tests do not mix with a user's."""
    before = os.environ.get("INTROVAE_CACHE")
    os.environ["INTROVAE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("INTROVAE_CACHE")
    if before is not None:
        os.environ["INTROVAE_CACHE"] = before
