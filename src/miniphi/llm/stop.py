"""Finding stop strings in a stream of text. Knows characters only, neither tokens nor models."""

from collections.abc import Sequence

from miniphi.errors import InvalidRequestError

__all__ = ["StopMatcher"]


class StopMatcher:
    """Cuts a stream of text at the first stop string, however the stream is divided into pieces.

    Text that could still become the beginning of a stop string is held back; text from a stop string onwards never
    leaves. The stop string that is completed first wins, and of two that are completed by the same character the
    longer one, so the result does not depend on how the text was divided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`. Raises InvalidRequestError for an empty stop string, which would match everywhere."""
        for stop in stops:
            if not stop:
                raise InvalidRequestError("stop: found an empty string; give strings of at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None so far."""
        return self._matched

    def push(self, text: str) -> str:
        """Take the next piece of text and return what may leave now; after a match, nothing ever does."""
        if self._matched is not None:
            return ""
        text = self._held + text
        found = self._first_match(text)
        if found is not None:
            start, self._matched = found
            self._held = ""
            return text[:start]
        keep = self._longest_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what was held back: the stream has ended, so it is ordinary text."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _longest_beginning(self, text: str) -> int:
        """Return how many characters at the end of `text` are the beginning of some stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            tail = text[len(text) - size :]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
