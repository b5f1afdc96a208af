"""The fake must notice what a real program would silently get wrong."""

import numpy as np
import pytest

from miniphi.engine import Batch
from miniphi.testing import FakeProgram, fake_config


def make_batch(
    tokens: list[int], *, start: int = 0, blocks: list[int] | None = None, use_long: bool = False, **changes: object
) -> Batch:
    fields: dict[str, object] = {
        "token_ids": np.array(tokens, np.int32),
        "positions": np.arange(start, start + len(tokens), dtype=np.int32),
        "query_starts": np.array([0, len(tokens)], np.int32),
        "context_lens": np.array([start + len(tokens)], np.int32),
        "block_tables": np.array([blocks or [0, 1]], np.int32),
        "use_long_factors": np.array([use_long]),
        "logit_rows": np.array([len(tokens) - 1], np.int32),
    }
    return Batch(**(fields | changes))  # type: ignore[arg-type]


def test_chunks_give_the_logits_of_the_whole() -> None:
    program = FakeProgram()
    tokens = list(range(1, 41))
    program.run(make_batch(tokens[:30], blocks=[7, 3]))
    got = program.run(make_batch(tokens[30:], start=30, blocks=[7, 3]))
    np.testing.assert_array_equal(got[0], program.logits(tokens))
    assert np.isfinite(got).all()
    assert not np.array_equal(program.logits(tokens), program.logits(tokens, use_long_factors=True))
    assert not np.array_equal(program.logits([1, 2]), program.logits([2, 1]))


def test_a_wrong_block_table_or_a_hole_is_noticed() -> None:
    program = FakeProgram()
    program.run(make_batch(list(range(1, 33)), blocks=[7]))
    with pytest.raises(AssertionError, match="other positions"):
        program.run(make_batch([1], start=32, blocks=[6, 3]))
    with pytest.raises(AssertionError, match="other positions"):
        program.run(make_batch([1], start=34, blocks=[7, 3]))


def test_an_overwritten_block_changes_the_logits() -> None:
    program = FakeProgram()
    program.run(make_batch([1, 2, 3], blocks=[7]))
    program.run(make_batch([1, 9, 3], blocks=[7]))
    got = program.run(make_batch([4], start=3, blocks=[7]))
    np.testing.assert_array_equal(got[0], program.logits([1, 9, 3, 4]))


def test_mixed_factor_sets_are_noticed() -> None:
    program = FakeProgram(fake_config(original_context=2))
    program.run(make_batch([1, 2]))
    with pytest.raises(AssertionError, match="rope factor sets are mixed"):
        program.run(make_batch([3], start=2, use_long=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"token_ids": np.array([1, 2], np.int64)},
        {"token_ids": np.array([1, 64], np.int32)},
        {"positions": np.array([0, 2], np.int32)},
        {"query_starts": np.array([0, 1], np.int32)},
        {"context_lens": np.array([3], np.int32)},
        {"block_tables": np.array([[99, 0]], np.int32)},
        {"block_tables": np.array([[0], [0]], np.int32)},
        {"logit_rows": np.array([2], np.int32)},
        {"logit_rows": np.array([1, 0], np.int32)},
        {"use_long_factors": np.array([0])},
    ],
)
def test_a_malformed_batch_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        FakeProgram().run(make_batch([1, 2], **changes))


def test_limits_are_kept() -> None:
    with pytest.raises(AssertionError, match="2 tokens in a step"):
        FakeProgram(max_batch_tokens=1).run(make_batch([1, 2]))
    with pytest.raises(AssertionError, match="2 rows of logits"):
        FakeProgram(max_logit_rows=1).run(make_batch([1, 2], logit_rows=np.array([0, 1], np.int32)))
