import pytest

from miniphi.engine import Request
from miniphi.engine.request import RopePolicy
from miniphi.errors import CapacityError, InvalidRequestError

from .scheduling import add, commit, make_scheduler, spans


def test_nothing_to_do() -> None:
    assert make_scheduler().schedule().chunks == []


def test_a_prompt_is_cut_at_the_token_budget() -> None:
    scheduler = make_scheduler()
    add(scheduler, 40, name="a")
    seen = []
    for _ in range(4):
        step = scheduler.schedule()
        seen += spans(step)
        commit(scheduler, step)
    assert seen == [("a", 0, 16, False), ("a", 16, 32, False), ("a", 32, 40, True), ("a", 40, 41, True)]


def test_decodes_come_first_and_prompts_fill_the_rest() -> None:
    scheduler = make_scheduler(prefill_chunk=10)
    add(scheduler, 3, name="a")
    add(scheduler, 2, name="b")
    commit(scheduler, scheduler.schedule())
    add(scheduler, 25, name="c")
    add(scheduler, 25, name="d")
    assert spans(scheduler.schedule()) == [
        ("a", 3, 4, True),
        ("b", 2, 3, True),
        ("c", 0, 7, False),
        ("d", 0, 7, False),
    ]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = make_scheduler(num_blocks=300)
    add(scheduler, 1000, name="long", max_tokens=1)
    commit(scheduler, scheduler.schedule())
    add(scheduler, 12, name="short")
    add(scheduler, 3, name="shorter")
    step = scheduler.schedule()
    assert spans(step) == [("long", 16, 24, False), ("short", 0, 8, False)]
    commit(scheduler, step)
    step = scheduler.schedule()
    assert spans(step) == [("long", 24, 36, False), ("short", 8, 12, True)]
    commit(scheduler, step)
    # What the others do not need, the oldest has.
    assert spans(scheduler.schedule()) == [("short", 12, 13, True), ("long", 36, 48, False), ("shorter", 0, 3, True)]


def test_a_prompt_that_can_be_finished_is_finished() -> None:
    scheduler = make_scheduler()
    add(scheduler, 20, name="a")
    add(scheduler, 20, name="b")
    seen = []
    for _ in range(3):
        step = scheduler.schedule()
        seen.append(spans(step))
        commit(scheduler, step)
    assert seen == [
        [("a", 0, 8, False), ("b", 0, 8, False)],
        [("a", 8, 20, True), ("b", 8, 12, False)],
        [("a", 20, 21, True), ("b", 12, 20, True)],
    ]


def test_a_prompt_waits_for_one_that_begins_alike() -> None:
    scheduler = make_scheduler()
    beginning = tuple(range(100, 124))
    for name in ("a", "b", "c"):
        request = Request(id=name, token_ids=(*beginning, *(900 + ord(name) + i for i in range(6))))
        scheduler.add(request, max_tokens=5, stop_token_ids=frozenset({0}))
    add(scheduler, 3, name="other")
    seen = []
    for _ in range(3):
        step = scheduler.schedule()
        seen.append(spans(step))
        commit(scheduler, step)
    assert seen[0] == [("a", 0, 13, False), ("other", 0, 3, True)]
    assert seen[1] == [("other", 3, 4, True), ("a", 13, 28, False)]
    # The 24 tokens that they share are there now, and computed once.
    assert seen[2][:3] == [("other", 4, 5, True), ("a", 28, 30, True), ("b", 24, 30, True)]
    assert ("c", 24, 30, True) in seen[2]


def test_prompts_take_less_of_a_step_where_others_wait_for_a_token() -> None:
    scheduler = make_scheduler()
    add(scheduler, 100, name="long", max_tokens=1)
    assert spans(scheduler.schedule(4)) == [("long", 0, 16, False)]
    scheduler = make_scheduler()
    add(scheduler, 2, name="a")
    commit(scheduler, scheduler.schedule())
    add(scheduler, 100, name="long", max_tokens=1)
    assert spans(scheduler.schedule(4)) == [("a", 2, 3, True), ("long", 0, 4, False)]


def test_first_come_first_served() -> None:
    scheduler = make_scheduler(num_blocks=10)
    add(scheduler, 20, name="a")
    add(scheduler, 20, name="large")
    add(scheduler, 1, name="small")
    # The small one would fit beside the first, but the large one came before it.
    assert [c.sequence.request.id for c in scheduler.schedule().chunks] == ["a"]
    assert scheduler.num_waiting == 2


def test_no_more_sequences_than_allowed() -> None:
    scheduler = make_scheduler(max_sequences=2)
    for _ in range(3):
        add(scheduler, 1)
    assert len(scheduler.schedule().chunks) == 2
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_sequences_never_outnumber_logit_rows() -> None:
    scheduler = make_scheduler(max_logit_rows=3)
    for _ in range(6):
        add(scheduler, 1)
    for _ in range(3):
        step = scheduler.schedule()
        assert len(step.chunks) == 3
        commit(scheduler, step)


def test_stop_ids_and_lengths_end_a_sequence() -> None:
    scheduler = make_scheduler()
    add(scheduler, 4, 2, name="a")
    add(scheduler, 4, 9, name="b")
    first = scheduler.schedule()
    assert [scheduler.commit(chunk, [5]) for chunk in first.chunks] == [None, None]
    second = scheduler.schedule()
    assert [scheduler.commit(chunk, [token]) for chunk, token in zip(second.chunks, (5, 0), strict=True)] == [
        "length",
        "stop",
    ]
    assert scheduler.cache.num_used == 0
    assert scheduler.schedule().chunks == []


def test_the_newest_is_pre_empted_and_keeps_its_tokens() -> None:
    scheduler = make_scheduler(num_blocks=4, max_sequences=2, allow_reuse=False)
    (old,) = add(scheduler, 4, 12, name="old")
    (new,) = add(scheduler, 3, 8, name="new")
    commit(scheduler, scheduler.schedule())
    while not scheduler.num_preemptions:
        step = scheduler.schedule()
        commit(scheduler, step)
    assert [c.sequence.request.id for c in step.chunks] == ["old"]
    assert new.num_generated > 0
    assert (new.num_computed, len(new.block_table)) == (0, 0)
    kept = list(new.token_ids)
    while not old.is_finished:
        commit(scheduler, scheduler.schedule())
    step = scheduler.schedule()
    assert spans(step) == [("new", 0, len(kept), True)]
    assert list(new.token_ids) == kept


def test_a_newcomer_leaves_a_spare_block_for_each_running_sequence() -> None:
    scheduler = make_scheduler(num_blocks=4)
    add(scheduler, 4, 8, name="a")
    commit(scheduler, scheduler.schedule())
    add(scheduler, 8, 1, name="b")
    assert [c.sequence.request.id for c in scheduler.schedule().chunks] == ["a"]
    assert (scheduler.cache.num_available, scheduler.num_waiting) == (2, 1)


def test_a_pre_empted_sequence_goes_before_those_that_came_later() -> None:
    scheduler = make_scheduler(num_blocks=4, max_sequences=2)
    add(scheduler, 4, 12, name="old")
    add(scheduler, 3, 8, name="new")
    add(scheduler, 1, 1, name="later")
    while not scheduler.num_preemptions:
        commit(scheduler, scheduler.schedule())
    scheduler.abort("old")
    assert [c.sequence.request.id for c in scheduler.schedule().chunks] == ["new", "later"]


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    scheduler = make_scheduler(num_blocks=3)
    add(scheduler, 5, 8)  # the last token is not computed: 12 tokens, 3 blocks
    with pytest.raises(CapacityError, match=r"5 tokens with max_tokens 9 may need 4 cache blocks .* cache has 3"):
        add(scheduler, 5, 9)
    assert scheduler.num_waiting == 1


def test_an_id_in_flight_is_refused_and_free_again_afterwards() -> None:
    scheduler = make_scheduler()
    add(scheduler, 4, name="a")
    with pytest.raises(InvalidRequestError, match="'a' is already in flight"):
        add(scheduler, 4, name="a")
    scheduler.abort("a")
    add(scheduler, 4, name="a")


def test_abort_gives_blocks_back_at_once() -> None:
    scheduler = make_scheduler()
    add(scheduler, 20, name="a")
    add(scheduler, 20, name="b")
    scheduler.schedule()
    assert scheduler.cache.num_used == 10
    assert len(scheduler.abort("a")) == 1
    assert scheduler.cache.num_used == 5
    assert len(scheduler.abort("b")) == 1
    assert scheduler.cache.num_used == 0
    assert scheduler.abort("b") == ()
    assert scheduler.abort("unknown") == ()
    assert scheduler.schedule().chunks == []


def test_siblings_wait_for_the_prompt_and_share_its_full_blocks() -> None:
    scheduler = make_scheduler()
    sequences = add(scheduler, 22, name="a", n=3)
    add(scheduler, 3, name="b")
    first = scheduler.schedule()
    assert spans(first) == [("a", 0, 13, False), ("b", 0, 3, True)]
    commit(scheduler, first)
    second = scheduler.schedule()
    assert spans(second) == [("b", 3, 4, True), ("a", 13, 22, True)]
    commit(scheduler, second)
    third = scheduler.schedule()
    assert [(c.sequence.index, c.start, c.end) for c in third.chunks if c.sequence.request.id == "a"] == [
        (0, 22, 23),
        (1, 20, 22),
        (2, 20, 22),
    ]
    assert sequences[1].block_table[:5] == sequences[0].block_table[:5] == sequences[2].block_table[:5]
    assert len({s.block_table[5] for s in sequences}) == 3
    assert scheduler.num_reused_tokens == 40
    assert [s.num_cached_tokens for s in sequences] == [0, 20, 20]


def test_siblings_start_when_their_leader_is_aborted() -> None:
    scheduler = make_scheduler()
    add(scheduler, 20, name="a", n=2)
    scheduler.schedule()
    scheduler.abort("a", 0)
    assert [(c.sequence.index, c.start) for c in scheduler.schedule().chunks] == [(1, 0)]


def test_a_whole_cached_prompt_still_computes_its_last_token() -> None:
    scheduler = make_scheduler()
    add(scheduler, 8, 1, name="a")
    commit(scheduler, scheduler.schedule())
    add(scheduler, 8, 1, name="a")
    assert spans(scheduler.schedule()) == [("a", 4, 8, True)]


def test_cached_tokens_are_those_of_the_first_admission() -> None:
    scheduler = make_scheduler(6)
    add(scheduler, 8, 1, name="a")
    commit(scheduler, scheduler.schedule())
    add(scheduler, 4, 14, name="older")
    (sequence,) = add(scheduler, 8, 12, name="a")
    assert sequence.num_cached_tokens is None
    while (step := scheduler.schedule()).chunks:
        commit(scheduler, step)
    assert scheduler.num_preemptions > 0
    assert scheduler.num_reused_tokens > 4, "it found its own blocks when it came back"
    assert sequence.num_cached_tokens == 4


@pytest.mark.parametrize(("start", "computed_from"), [(16, 12), (12, 8), (13, 12), (1, 0), (5, 4)])
def test_tokens_whose_logits_are_needed_are_not_taken_from_the_cache(start: int, computed_from: int) -> None:
    scheduler = make_scheduler()
    add(scheduler, 16, 1, name="a")
    commit(scheduler, scheduler.schedule())
    add(scheduler, 16, 1, name="a", logprobs_start=start)
    rows, first = [], None
    while chunks := scheduler.schedule().chunks:
        first = chunks[0].start if first is None else first
        rows += list(chunks[0].prompt_rows)
        scheduler.commit(chunks[0], [5] if chunks[0].is_sampled else [])
    assert first == computed_from
    assert rows == list(range(start - 1, 15))


def test_rows_of_logits_bound_a_chunk_that_wants_them() -> None:
    scheduler = make_scheduler(max_logit_rows=4)
    add(scheduler, 15, name="a", logprobs_start=7)
    seen = []
    for _ in range(3):
        (chunk,) = scheduler.schedule().chunks
        seen.append((chunk.start, chunk.end, chunk.prompt_rows, chunk.is_sampled))
        scheduler.commit(chunk, [5] if chunk.is_sampled else [])
    assert seen == [(0, 10, range(6, 10), False), (10, 14, range(10, 14), False), (14, 15, range(14, 14), True)]


@pytest.mark.parametrize(
    ("policy", "prompt_len", "max_tokens", "expected"),
    [
        ("auto", 10, 10, False),
        ("auto", 10, 11, True),
        ("auto", 21, 1, True),
        ("hf", 20, 11, False),
        ("hf", 21, 1, True),
        ("short", 30, 10, False),
        ("long", 1, 1, True),
    ],
)
def test_the_factor_set(policy: RopePolicy, prompt_len: int, max_tokens: int, expected: bool) -> None:
    scheduler = make_scheduler(original_context=20)
    (sequence,) = add(scheduler, prompt_len, max_tokens, rope_policy=policy)
    assert sequence.use_long_factors is expected
    plain = make_scheduler()
    (sequence,) = add(plain, prompt_len, max_tokens, rope_policy=policy)
    assert sequence.use_long_factors is False


def test_hf_policy_switches_at_the_first_token_beyond_the_border() -> None:
    scheduler = make_scheduler(original_context=6)
    (sequence,) = add(scheduler, 4, 5, name="a", rope_policy="hf")
    seen = []
    while chunks := scheduler.schedule().chunks:
        (chunk,) = chunks
        seen.append((chunk.start, chunk.end, sequence.use_long_factors))
        scheduler.commit(chunk, [5])
    assert seen == [(0, 4, False), (4, 5, False), (5, 6, False), (0, 7, True), (7, 8, True)]
    assert scheduler.num_preemptions == 0
    assert scheduler.cache.num_used == 0


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_logit_rows", "max_sequences", "prefill_chunk"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{name} must be at least 1, not 0"):
        make_scheduler(**{name: 0})
