from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from miniphi.engine.kv_cache import KVCache
from miniphi.errors import CapacityError

BLOCK = 2
NUM_BLOCKS = 9
Scope = tuple[bool, str]


def keys_of(cache: KVCache, tokens: list[int], scope: Scope = (False, "")) -> list[bytes]:
    keys: list[bytes] = []
    cache.extend_keys(
        keys, array("i", tokens), len(tokens) // cache.block_size, use_long_factors=scope[0], salt=scope[1]
    )
    return keys


def fill(cache: KVCache, tokens: list[int], scope: Scope = (False, "")) -> list[int]:
    """Reserve, compute and commit the full blocks of a sequence."""
    keys = keys_of(cache, tokens, scope)
    blocks = cache.reserve(len(keys))
    for block, key in zip(blocks, keys, strict=True):
        cache.commit(block, key)
    return blocks


def test_a_released_prefix_is_found_again_up_to_the_first_difference() -> None:
    cache = KVCache(NUM_BLOCKS, block_size=BLOCK)
    blocks = fill(cache, [1, 2, 3, 4, 5, 6])
    cache.release(blocks)
    assert (cache.num_used, cache.num_cached, cache.num_free) == (0, 3, 6)
    assert cache.match_prefix(keys_of(cache, [1, 2, 3, 4, 9, 9])) == blocks[:2]
    assert (cache.num_used, cache.num_cached, cache.num_free) == (2, 1, 6)


@pytest.mark.parametrize("other", [(True, ""), (False, "salt"), (True, "salt")])
def test_another_factor_set_or_salt_is_another_prefix(other: Scope) -> None:
    cache = KVCache(NUM_BLOCKS, block_size=BLOCK)
    blocks = fill(cache, [1, 2, 3, 4])
    assert cache.match_prefix(keys_of(cache, [1, 2, 3, 4], other)) == []
    assert cache.match_prefix(keys_of(cache, [1, 2, 3, 4])) == blocks


def test_the_same_tokens_after_another_prefix_do_not_match() -> None:
    cache = KVCache(NUM_BLOCKS, block_size=BLOCK)
    fill(cache, [1, 2, 3, 4])
    assert cache.match_prefix(keys_of(cache, [3, 4])) == []
    assert cache.match_prefix(keys_of(cache, [9, 9, 3, 4])) == []


def test_blocks_that_were_never_committed_are_not_found() -> None:
    cache = KVCache(NUM_BLOCKS, block_size=BLOCK)
    blocks = cache.reserve(2)
    assert cache.match_prefix(keys_of(cache, [1, 2])) == []
    cache.release(blocks)
    assert cache.num_free == NUM_BLOCKS


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_start() -> None:
    cache = KVCache(4, block_size=BLOCK)
    old = fill(cache, [1, 1, 2, 2])
    cache.release(old)
    new = fill(cache, [3, 3, 4, 4])
    cache.release(new)
    cache.release(cache.match_prefix(keys_of(cache, [1, 1])))  # [1, 1] is now the most recent
    assert cache.reserve(2) == [old[1], new[1]]
    assert cache.match_prefix(keys_of(cache, [3, 3, 4, 4])) == new[:1]
    assert cache.match_prefix(keys_of(cache, [1, 1, 2, 2])) == old[:1]


def test_free_blocks_go_before_cached_ones() -> None:
    cache = KVCache(4, block_size=BLOCK)
    cached = fill(cache, [1, 1])
    cache.release(cached)
    assert cached[0] not in cache.reserve(3)
    assert cache.num_cached == 1


def test_two_holders_keep_a_block() -> None:
    cache = KVCache(4, block_size=BLOCK)
    blocks = fill(cache, [1, 1])
    assert cache.match_prefix(keys_of(cache, [1, 1])) == blocks
    cache.release(blocks)
    assert cache.num_used == 1
    cache.release(blocks)
    assert cache.num_used == 0


def test_a_second_copy_of_a_prefix_is_simply_freed() -> None:
    cache = KVCache(4, block_size=BLOCK)
    first, second = fill(cache, [1, 1]), fill(cache, [1, 1])
    cache.release(second)
    assert cache.num_free == 3
    assert cache.match_prefix(keys_of(cache, [1, 1])) == first


def test_reserving_too_much_hands_out_nothing() -> None:
    cache = KVCache(4)
    cache.reserve(3)
    with pytest.raises(CapacityError, match="2 cache blocks were asked for and 1 of 4 are available"):
        cache.reserve(2)
    assert cache.num_free == 1


def test_releasing_twice_is_refused() -> None:
    cache = KVCache(4)
    blocks = cache.reserve(1)
    cache.release(blocks)
    with pytest.raises(ValueError, match="released more often"):
        cache.release(blocks)
    assert cache.num_free == 4


def test_without_reuse_nothing_is_cached() -> None:
    cache = KVCache(4, block_size=BLOCK, allow_reuse=False)
    blocks = fill(cache, [1, 1])
    assert cache.match_prefix(keys_of(cache, [1, 1])) == []
    cache.release(blocks)
    assert (cache.num_free, cache.num_cached) == (4, 0)


def test_num_blocks_for() -> None:
    cache = KVCache(4)
    assert [cache.num_blocks_for(n) for n in (0, 1, 32, 33, 64)] == [0, 1, 1, 2, 2]


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, share and go; a shadow of every block's content says what may be shared."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_BLOCKS, block_size=BLOCK)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[Scope, tuple[int, ...]]] = {}

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        scope=st.sampled_from([(False, ""), (True, ""), (False, "a")]),
        is_computed=st.booleans(),
    )
    def start(self, tokens: list[int], scope: Scope, is_computed: bool) -> None:
        keys = keys_of(self.cache, tokens, scope)
        matched = self.cache.match_prefix(keys)
        for index, block in enumerate(matched):
            assert self.content[block] == (scope, tuple(tokens[: (index + 1) * BLOCK]))
        missing = self.cache.num_blocks_for(len(tokens)) - len(matched)
        if missing > self.cache.num_available:
            with pytest.raises(CapacityError):
                self.cache.reserve(missing)
            self.cache.release(matched)
            return
        fresh = self.cache.reserve(missing)
        in_use = {block for blocks in self.held for block in blocks} | set(matched)
        assert not in_use & set(fresh)
        assert len(set(fresh)) == len(fresh)
        blocks = matched + fresh
        for index in range(len(matched), len(blocks)):
            self.content[blocks[index]] = (scope, tuple(tokens[: (index + 1) * BLOCK]))
            if is_computed and index < len(keys):
                self.cache.commit(blocks[index], keys[index])
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.cache.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        holders = [block for blocks in self.held for block in blocks]
        assert self.cache.num_used == len(set(holders))
        assert self.cache.num_free + self.cache.num_cached + self.cache.num_used == NUM_BLOCKS
        assert self.cache.num_available == NUM_BLOCKS - len(set(holders))

    def teardown(self) -> None:
        for blocks in self.held:
            self.cache.release(blocks)
        assert self.cache.num_available == NUM_BLOCKS
        assert sorted(self.cache.reserve(NUM_BLOCKS)) == list(range(NUM_BLOCKS))


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
