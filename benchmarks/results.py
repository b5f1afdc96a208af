"""Measurements as they were taken, and what the table says of them: medians, ratios, shares of the limit.

Every sample keeps the limits that the machine gave just before and just after it, because a machine's bandwidth can
change between two samples; a share is computed sample by sample, and the median of the shares is shown.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks.limits import Demand, Limits

OURS = "miniphi"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measurement of one engine."""

    engine: str
    value: float
    """in the unit of its block"""
    before: Limits
    after: Limits
    peak_bytes: int
    """of the engine's process so far; 0 where that is not known"""

    @property
    def limits(self) -> Limits:
        """The machine's limits in the middle of it, as far as one can tell."""
        return Limits(
            int8_ops_per_s=(self.before.int8_ops_per_s + self.after.int8_ops_per_s) / 2,
            read_bytes_per_s=(self.before.read_bytes_per_s + self.after.read_bytes_per_s) / 2,
        )


@dataclass(kw_only=True)
class Block:
    """One work on one model by all engines in turn; a row of the table."""

    model: str
    work: str
    label: str
    unit: str
    samples: list[Sample] = field(default_factory=list)
    demands: dict[str, Demand] = field(default_factory=dict)
    """What a step needs, by engine; engines of other formats read other bytes. Empty where nothing limits it."""
    variants: dict[str, str] = field(default_factory=dict)
    """Which of an engine's settings was the fastest, by engine"""
    missing: dict[str, str] = field(default_factory=dict)
    """Why there is no figure, by engine"""

    def values(self, engine: str) -> list[float]:
        """Return what was measured of an engine, in order."""
        return [sample.value for sample in self.samples if sample.engine == engine]

    def median(self, engine: str) -> float | None:
        """Return the median, or None if nothing was measured."""
        values = self.values(engine)
        return statistics.median(values) if values else None

    def ratio(self, peer: str) -> float | None:
        """Return how many times faster ours is, by medians: above 1 ours is ahead, whatever the unit."""
        ours, theirs = self.median(OURS), self.median(peer)
        if ours is None or theirs is None:
            return None
        return theirs / ours if self.unit == "s" else ours / theirs

    def limit(self, engine: str) -> float | None:
        """Return the speed that the machine allowed the engine, the median over its samples."""
        demand, samples = self.demands.get(engine), self._samples(engine)
        if demand is None or not samples:
            return None
        return statistics.median(demand.tokens_per_s(sample.limits) for sample in samples)

    def share(self, engine: str) -> float | None:
        """Return the share of that speed that it reached, the median over its samples."""
        demand, samples = self.demands.get(engine), self._samples(engine)
        if demand is None or not samples:
            return None
        return statistics.median(sample.value / demand.tokens_per_s(sample.limits) for sample in samples)

    def peak_bytes(self, engine: str) -> int:
        """Return the most memory that one of its processes had."""
        return max((sample.peak_bytes for sample in self._samples(engine)), default=0)

    def bandwidths(self) -> tuple[float, float] | None:
        """Return the lowest and the highest read bandwidth beside the samples, in bytes per second."""
        rates = [limits.read_bytes_per_s for sample in self.samples for limits in (sample.before, sample.after)]
        return (min(rates), max(rates)) if rates else None

    def _samples(self, engine: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.engine == engine]


@dataclass(kw_only=True)
class Results:
    """Everything that one or several runs measured."""

    date: str
    processor: str
    isa: str
    num_threads: int
    engines: dict[str, str]
    """Version by engine, ours first"""
    absent: dict[str, str]
    """Why an engine was not measured, in one line"""
    models: dict[str, dict[str, str]] = field(default_factory=dict)
    """What file each engine ran, by model"""
    blocks: list[Block] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """Return everything for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> "Results":
        """Read what `to_dict` wrote."""
        fields = dict(stored)
        blocks = fields.pop("blocks")
        assert isinstance(blocks, list)
        return cls(**fields, blocks=[_read_block(block) for block in blocks])  # type: ignore[arg-type]

    def add(self, other: "Results") -> None:
        """Take over a later run's blocks; its rows replace rows of the same work and model."""
        replaced = {(block.model, block.work) for block in other.blocks}
        self.blocks = [block for block in self.blocks if (block.model, block.work) not in replaced] + other.blocks
        self.engines |= other.engines
        self.absent = {name: why for name, why in (self.absent | other.absent).items() if name not in self.engines}
        for model, files in other.models.items():
            self.models[model] = self.models.get(model, {}) | files
        self.date = other.date


def _read_block(stored: dict[str, object]) -> Block:
    samples, demands = stored.pop("samples"), stored.pop("demands")
    assert isinstance(samples, list)
    assert isinstance(demands, dict)
    return Block(
        **stored,  # type: ignore[arg-type]
        samples=[
            Sample(**{**sample, "before": Limits(**sample["before"]), "after": Limits(**sample["after"])})
            for sample in samples
        ],
        demands={engine: Demand(**demand) for engine, demand in demands.items()},
    )


def speed_rows(results: Results, model: str) -> list[list[str]]:
    """Return the table of one model, its heading first."""
    peers = [name for name in results.engines if name != OURS]
    heading = ["work", OURS, "limit", "reached"]
    for peer in peers:
        heading += [peer, "reached", "ratio"]
    rows = [[*heading, "samples", "GB/s"]]
    for block in results.blocks:
        if block.model != model:
            continue
        row = [f"{block.label}, {block.unit}", number(block.median(OURS)), number(block.limit(OURS))]
        row.append(_percent(block.share(OURS)))
        for peer in peers:
            ratio = block.ratio(peer)
            row += [number(block.median(peer)), _percent(block.share(peer)), "" if ratio is None else f"{ratio:.2f}"]
        repeats = [len(block.values(engine)) for engine in results.engines if block.values(engine)]
        rows.append([*row, str(min(repeats, default=0)), _span(block.bandwidths())])
    return rows


def memory_rows(results: Results, model: str) -> list[list[str]]:
    """Return the peak memory of one model's works, its heading first."""
    rows = [["peak memory, GB", *results.engines]]
    for block in results.blocks:
        peaks = [block.peak_bytes(engine) for engine in results.engines]
        if block.model == model and any(peaks):
            rows.append([block.label, *(f"{peak / 1e9:.2f}" if peak else "" for peak in peaks)])
    return rows


def notes(results: Results, model: str) -> list[str]:
    """Return a line for every engine that is not here, every figure that is missing, and every setting chosen."""
    lines = [f"{name}: {why}" for name, why in results.absent.items()]
    for block in results.blocks:
        if block.model == model:
            lines += [f"{block.label}: no figure of {engine}: {why}" for engine, why in block.missing.items()]
            lines += [f"{block.label}: {engine} with {chosen}" for engine, chosen in block.variants.items() if chosen]
    return lines


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table that reads well as text and as Markdown; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Iterable[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def number(value: float | None) -> str:
    """Return three or four digits of a figure, and nothing of none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _span(rates: tuple[float, float] | None) -> str:
    return "" if rates is None else f"{rates[0] / 1e9:.0f}-{rates[1] / 1e9:.0f}"
