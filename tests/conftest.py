"""What every test can rely on."""

import signal

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interrupts_arrive() -> None:
    """Take Ctrl-C as in a terminal: a job in the background starts with it ignored, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
