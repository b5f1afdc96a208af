from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniphi.engine.request import Sequence

from .scheduling import BLOCK, add, commit, make_scheduler


@dataclass(kw_only=True)
class Plan:
    """A request of the property test below."""

    prompt_len: int
    max_tokens: int
    n: int
    arrival: int
    logprobs_start: int | None = field(default=None)


PLANS = st.lists(
    st.builds(
        Plan,
        prompt_len=st.integers(1, 20),
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
        arrival=st.integers(0, 20),
        logprobs_start=st.sampled_from([None, 1]),
    ),
    min_size=1,
    max_size=8,
)


@given(
    plans=PLANS,
    num_blocks=st.integers(8, 14),
    max_batch_tokens=st.integers(1, 9),
    max_logit_rows=st.integers(1, 5),
    prefill_chunk=st.sampled_from([None, 1, 3]),
    allow_reuse=st.booleans(),
    original_context=st.sampled_from([None, 9]),
    draft_len=st.integers(0, 6),
    num_true=st.integers(0, 6),
)
@settings(deadline=None, max_examples=300)
def test_every_sequence_ends_and_every_limit_holds(
    *,
    plans: list[Plan],
    num_blocks: int,
    max_batch_tokens: int,
    max_logit_rows: int,
    prefill_chunk: int | None,
    allow_reuse: bool,
    original_context: int | None,
    draft_len: int,
    num_true: int,
) -> None:
    scheduler = make_scheduler(
        num_blocks,
        allow_reuse=allow_reuse,
        max_batch_tokens=max_batch_tokens,
        max_logit_rows=max_logit_rows,
        prefill_chunk=prefill_chunk,
        original_context=original_context,
    )
    sequences: list[Sequence] = []
    rows: dict[Sequence, list[int]] = {}
    for now in range(5000):
        for number, plan in enumerate(plans):
            if plan.arrival == now:
                sequences += add(
                    scheduler,
                    plan.prompt_len,
                    plan.max_tokens,
                    name=f"p{number}",
                    n=plan.n,
                    rope_policy="hf",
                    logprobs_start=plan.logprobs_start,
                )
        oldest = min((s for s in sequences if s.block_table), key=lambda s: (s.arrival, s.index), default=None)
        before = oldest and (oldest.num_computed, len(oldest.token_ids), oldest.use_long_factors)
        step = scheduler.schedule()
        if not step.chunks:
            assert all(s.is_finished for s in sequences)
            if now > 20:
                break
            continue
        preemptions = scheduler.num_preemptions
        scheduler.add_drafts(step, [(5,) * draft_len for _ in step.chunks])
        assert scheduler.num_preemptions == preemptions
        assert sum(c.end - c.start + len(c.draft) for c in step.chunks) <= max_batch_tokens
        assert sum(len(c.prompt_rows) + c.is_sampled + len(c.draft) for c in step.chunks) <= max_logit_rows
        assert len({c.sequence for c in step.chunks}) == len(step.chunks)
        for chunk in step.chunks:
            sequence = chunk.sequence
            last = chunk.end + len(chunk.draft)
            assert chunk.start == sequence.num_computed < chunk.end <= last <= len(sequence.block_table) * BLOCK
            assert last <= sequence.prompt_len + sequence.max_tokens - 1 or not chunk.draft
            assert sequence.use_long_factors or last <= (original_context or 10**9) or not chunk.draft
            assert chunk.is_sampled == (chunk.end == len(sequence.token_ids))
            assert len(chunk.prompt_rows) == 0 or chunk.start <= chunk.prompt_rows[0]
            assert len(chunk.prompt_rows) == 0 or chunk.prompt_rows[-1] < chunk.end
            rows.setdefault(sequence, []).extend(chunk.prompt_rows)
        commit(scheduler, step, num_true=num_true)
        if oldest and not oldest.is_finished:
            assert before != (oldest.num_computed, len(oldest.token_ids), oldest.use_long_factors), "no progress"
    else:
        pytest.fail("the requests did not end")
    assert scheduler.cache.num_used == 0
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    for sequence in sequences:
        wants = sequence.request.prompt_logprobs_start if sequence.index == 0 else None
        assert rows[sequence] == ([] if wants is None else list(range(wants - 1, sequence.prompt_len - 1)))
        assert sequence.num_generated == sequence.max_tokens
