"""How much of a step prompts may take while other sequences wait for their next token. Knows times and counts only."""

__all__ = ["LEAST_TOKENS", "PromptPace"]

LEAST_TOKENS = 16
"""What a step grants prompts at least, also before anything was measured: else they would starve behind slow steps."""
TILE_TOKENS = 8
"""Rows that the kernels multiply at once"""


class PromptPace:
    """How many prompt tokens a step may have, so that it takes about as long as it should."""

    def __init__(self, max_step_s: float | None) -> None:
        self._max_step_s = max_step_s
        self._token_s: float | None = None

    @property
    def max_tokens(self) -> int | None:
        """The bound of the next step; None if there is none."""
        if self._max_step_s is None:
            return None
        wanted = LEAST_TOKENS if self._token_s is None else int(self._max_step_s / self._token_s)
        return max(LEAST_TOKENS, wanted // TILE_TOKENS * TILE_TOKENS)

    def record(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step that had prompt tokens; the newest counts a half, as attention grows with the prompt."""
        if num_tokens >= LEAST_TOKENS:  # a few tokens cost what reading the weights does
            newest = seconds / num_tokens
            self._token_s = newest if self._token_s is None else (self._token_s + newest) / 2
