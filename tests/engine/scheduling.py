"""Small schedulers and requests to drive them with."""

from zlib import crc32

from miniphi.engine import Request, SamplingParams
from miniphi.engine.kv_cache import KVCache
from miniphi.engine.request import RopePolicy, Sequence
from miniphi.engine.scheduler import ScheduledStep, Scheduler, SchedulerLimits

BLOCK = 4


def make_scheduler(num_blocks: int = 100, *, allow_reuse: bool = True, **limits: int | None) -> Scheduler:
    sizes: dict[str, int | None] = {"max_batch_tokens": 16, "max_logit_rows": 8, "max_sequences": 8} | limits
    cache = KVCache(num_blocks, block_size=BLOCK, allow_reuse=allow_reuse)
    return Scheduler(cache, SchedulerLimits(**sizes))  # type: ignore[arg-type]


def add(
    scheduler: Scheduler,
    prompt_len: int,
    max_tokens: int = 10,
    *,
    name: str | None = None,
    n: int = 1,
    rope_policy: RopePolicy = "auto",
    logprobs_start: int | None = None,
) -> tuple[Sequence, ...]:
    name = name or f"r{scheduler.num_running + scheduler.num_waiting}"
    request = Request(
        id=name,
        # Different prompts have different tokens, so that nothing is shared by accident.
        token_ids=tuple(crc32(f"{name} {i}".encode()) % 1000 + 10 for i in range(prompt_len)),
        params=SamplingParams(n=n),
        rope_policy=rope_policy,
        prompt_logprobs_start=logprobs_start,
    )
    return scheduler.add(request, max_tokens=max_tokens, stop_token_ids=frozenset({0}))


def commit(scheduler: Scheduler, step: ScheduledStep, token_id: int = 5, *, num_true: int = 0) -> None:
    """Sample a token for each chunk, and `num_true` of its guesses before it."""
    for chunk in step.chunks:
        scheduler.commit(chunk, [*chunk.draft[:num_true], token_id] if chunk.is_sampled else [])


def spans(step: ScheduledStep) -> list[tuple[str, int, int, bool]]:
    return [(c.sequence.request.id, c.start, c.end, c.is_sampled) for c in step.chunks]
