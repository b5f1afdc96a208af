"""Where tests find real data that is too large, or not ours, to copy into the project."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_path(relative: str) -> Path:
    """Return a file of the shared data folder, or skip the test and say why."""
    root = Path(os.environ.get("MINIPHI_SHARED", REPOSITORY.parent / "shared"))
    path = root / "data" / relative
    if not path.exists():
        pytest.skip(f"{relative} is not in the shared data folder ({root}); set MINIPHI_SHARED")
    return path


def smollm2_gguf() -> Path:
    """Return the SmolLM2 GGUF that `make chat` fetches, or skip the test and say how to get it."""
    from miniphi.models import cache_dir

    path = cache_dir() / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        pytest.skip("SmolLM2 is not in the cache; run `miniphi pull smollm2-135m-instruct`")
    return path
