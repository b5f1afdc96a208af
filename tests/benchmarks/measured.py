"""Results as a run would leave them, for tests of what is said about them."""

from benchmarks.limits import Demand, Limits
from benchmarks.results import Block, Results, Sample

SLOW = Limits(int8_ops_per_s=900e9, read_bytes_per_s=30e9)
FAST = Limits(int8_ops_per_s=900e9, read_bytes_per_s=60e9)
DECODE = Demand(num_tokens=1, num_bytes=3e9, num_ops=9e9)


def sample(engine: str, value: float, before: Limits = SLOW, after: Limits = SLOW, peak_bytes: int = 0) -> Sample:
    """Return one measurement."""
    return Sample(engine=engine, value=value, before=before, after=after, peak_bytes=peak_bytes)


def decode_block() -> Block:
    """Return a row of miniphi (9, 8, 18) and a peer (4, 6, 5): 10 tokens/s are possible at 30 GB/s, 20 at 60."""
    return Block(
        model="tiny",
        work="decode",
        label="decode, depth 16",
        unit="tok/s",
        samples=[
            sample("miniphi", 9.0, peak_bytes=2_000_000_000),
            sample("peer", 4.0, peak_bytes=3_000_000_000),
            sample("miniphi", 8.0, peak_bytes=2_100_000_000),
            sample("peer", 6.0),
            sample("miniphi", 18.0, FAST, FAST),
            sample("peer", 5.0),
        ],
        demands={"miniphi": DECODE, "peer": DECODE},
    )


def start_block() -> Block:
    """Return a row in seconds that nothing limits: half a second against a whole one."""
    samples = [sample("miniphi", 0.5), sample("peer", 1.0)]
    return Block(model="tiny", work="start", label="first token", unit="s", samples=samples)


def results(*blocks: Block) -> Results:
    """Return a run of these rows."""
    return Results(
        date="2026-01-02",
        processor="A Processor",
        isa="portable",
        num_threads=2,
        engines={"miniphi": "1.0", "peer": "2.0"},
        absent={"other": "not measured: it is not installed"},
        models={"tiny": {"miniphi": "random weights", "peer": "the same file"}},
        blocks=list(blocks),
    )
