"""Showing how far a transfer is: a bar on the terminal, a caller's function, or nothing."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress", "ProgressBar"]

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes done and the bytes in total."""


class ProgressBar:
    """The progress of one file; a context manager. `True` draws on stderr, and only if that is a terminal."""

    def __init__(self, progress: bool | Progress, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._done = 0
        self._report = progress if callable(progress) else None
        self._bar: Any = None
        if progress is True:
            from tqdm import tqdm  # noqa: PLC0415 - paid for only by those who watch

            self._bar = tqdm(desc=label, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None)

    def advance(self, count: int) -> None:
        """Add bytes; a negative count takes them back when a transfer starts again."""
        self._done += count
        if self._report is not None:
            self._report(self._label, self._done, self._total)
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
