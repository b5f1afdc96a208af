"""Which block of the key/value cache belongs to whom: reference counts, prefix reuse, eviction.

Owns block ids only; the keys and values themselves live in the program. A block is in exactly one state:

* free: its content means nothing;
* used: one or more sequences hold it (its reference count is above 0);
* cached: nobody holds it, but its content is known and can be found again through its key.

Only full blocks get a key. The key of a block is a 128-bit BLAKE2b digest of the previous block's key and its own
tokens, so it names the whole prefix; the chain starts from a digest of the rope factor set and the cache salt, and of a
secret of this process, so that nobody can prepare two prompts whose keys collide.
"""

import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from miniphi.engine.batch import KV_BLOCK_SIZE
from miniphi.errors import CapacityError

__all__ = ["KVCache"]

_KEY_BYTES = 16


class KVCache:
    """Hands out block ids, counts their holders and finds blocks that already hold a prefix."""

    def __init__(self, num_blocks: int, *, block_size: int = KV_BLOCK_SIZE, allow_reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.allow_reuse = allow_reuse
        self._secret = os.urandom(_KEY_BYTES)
        self._num_holders = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks whose content means nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds and that can still be matched."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence holds."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `reserve` can hand out, evicting cached ones if it must."""
        return len(self._free) + len(self._cached)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def reserve(self, count: int) -> list[int]:
        """Hand out `count` blocks with one holder each, evicting the least recently used cached ones if needed.

        Raises:
            CapacityError: fewer are available; nothing is handed out.
        """
        if count > self.num_available:
            raise CapacityError(
                f"{count} cache blocks were asked for and {self.num_available} of {self.num_blocks} are available"
            )
        # In ascending order: attention reads blocks with neighbouring numbers as one stream (csrc/kv_cache.h).
        blocks = sorted(self._free.pop() if self._free else self._evict() for _ in range(count))
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold on each block of a sequence, in the order of the sequence.

        Blocks that nobody holds any more are cached if they have a key, and free otherwise.
        """
        # Backwards, so that the end of a prefix is evicted before its start, without which it could not be found.
        for block in reversed(list(blocks)):
            if self._num_holders[block] == 0:
                raise ValueError(f"cache block {block} is released more often than it was reserved")
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._key_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def extend_keys(
        self, keys: list[bytes], token_ids: "array[int]", num_blocks: int, *, use_long_factors: bool, salt: str
    ) -> None:
        """Append to `keys`, the keys of a sequence's first full blocks, until there are `num_blocks`."""
        key = keys[-1] if keys else self._root_key(use_long_factors, salt)
        for index in range(len(keys), num_blocks):
            tokens = token_ids[index * self.block_size : (index + 1) * self.block_size]
            key = blake2b(key + tokens.tobytes(), digest_size=_KEY_BYTES).digest()
            keys.append(key)

    def match_prefix(self, keys: Iterable[bytes]) -> list[int]:
        """Take hold of the longest run of blocks that holds this prefix, and return it."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._num_holders[block] == 0:
                del self._cached[block]
            self._num_holders[block] += 1
            blocks.append(block)
        return blocks

    def commit(self, block: int, key: bytes) -> None:
        """Declare that a held block is full and computed, so that others can match it.

        Where another block already has this key, that one stays the one to match.
        """
        if self.allow_reuse and self._key_of[block] is None and key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
        return block

    def _root_key(self, use_long_factors: bool, salt: str) -> bytes:
        origin = (
            self._secret + (b"long" if use_long_factors else b"short") + b"\0" + salt.encode("utf-8", "surrogatepass")
        )
        return blake2b(origin, digest_size=_KEY_BYTES).digest()
