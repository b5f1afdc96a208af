"""What every test can rely on."""

import os
import signal

import pytest

# Tests load models by the dozen; those of the packed copies turn them on, in a cache of their own.
os.environ["MINIPHI_PACKED_COPY"] = "0"


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Take Ctrl-C as in a terminal: a job in the background starts with it ignored, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
