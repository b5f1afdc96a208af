"""Decoding with and without guessing ahead, A B A B, on the same prompts: what it gains, and what it costs.

    python -m benchmarks.speculation [--model NAME] [--draft NAME] [--texts FILE ...] [--temperatures 0 0.7]

Guesses are looked up, or with --draft made by that model too. Every text is summarised, edited and quoted from; `open`
asks for something new at temperature 1, where looking up fails. The texts are plain files, by default this project's
own documents. Both modes must write the same tokens, or it stops. Prints one table of tokens/s (the best of each
prompt's repetitions; sums over prompts) and one JSON line.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import miniphi
from miniphi import LLM, Completion

DOCS = Path(__file__).resolve().parent.parent / "docs"
TEXT_CHARACTERS = 3000
EDIT_CHARACTERS = 1200
TASKS = {
    "summarise": "{text}\n\nSummarise the text above.",
    "edit": "Correct the spelling of this text, and write all of it again:\n\n{short}",
    "quote": "{text}\n\nQuote the sentences of the text above that matter most.",
}
OPEN = (
    "Write a story about a lighthouse keeper who finds a letter.",
    "Explain why the sky is blue to somebody who cannot see.",
    "Invent five games that can be played with a stone and a rope.",
    "Compose a poem about the first day of winter.",
)
OPEN_TEMPERATURE = 1.0


@dataclass(kw_only=True)
class Record:
    """Sums over the prompts of one task."""

    mode: str
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    drafted: int = 0
    accepted: int = 0
    worst_gain: float = float("inf")
    """of one prompt"""

    def add(self, runs: dict[str, list[Completion]]) -> None:
        """Add one prompt's repetitions of both modes."""
        seconds = {mode: min(map(decode_seconds, completions)) for mode, completions in runs.items()}
        timings = runs[self.mode][-1].timings
        self.tokens += runs["off"][0].usage.completion_tokens - 1
        self.drafted += timings.drafted_tokens
        self.accepted += timings.accepted_tokens
        self.worst_gain = min(self.worst_gain, seconds["off"] / seconds[self.mode])
        for mode, value in seconds.items():
            self.seconds[mode] += value

    def to_dict(self) -> dict[str, float]:
        """Return the figures of the table."""
        return {
            "off_tokens_per_s": self.tokens / self.seconds["off"],
            f"{self.mode}_tokens_per_s": self.tokens / self.seconds[self.mode],
            "gain": self.seconds["off"] / self.seconds[self.mode],
            "worst_gain": self.worst_gain,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }


def decode_seconds(completion: Completion) -> float:
    """Return the time between the first token and the last."""
    rate = completion.timings.completion_tokens_per_s
    assert rate is not None, "the answer is too short to time"
    return (completion.usage.completion_tokens - 1) / rate


def measure(
    llm: LLM, prompt: str, temperature: float, mode: str, args: argparse.Namespace
) -> dict[str, list[Completion]]:
    """Answer one prompt without guesses and with them, by turns."""
    runs: dict[str, list[Completion]] = {"off": [], mode: []}
    for _ in range(args.repeats):
        for name, completions in runs.items():
            completions.append(
                llm.chat(
                    [{"role": "user", "content": prompt}],
                    temperature=temperature,
                    top_p=0.9,
                    seed=1,
                    max_tokens=args.tokens,
                    min_tokens=2,
                    speculate=name,  # type: ignore[arg-type]
                )
            )
    ids = {completion.choices[0].token_ids for completions in runs.values() for completion in completions}
    if len(ids) > 1:
        raise SystemExit(f"guessing ahead changed the answer to {prompt[:60]!r}")
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=miniphi.llm.DEFAULT_MODEL)
    parser.add_argument("--draft", metavar="NAME")
    parser.add_argument("--texts", nargs="+", type=Path, default=sorted(DOCS.glob("*.md")), metavar="FILE")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7], metavar="T")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    llm = miniphi.load(args.model, context=4096, num_threads=args.threads, draft=args.draft)
    mode = "auto" if args.draft else "lookup"
    texts = [path.read_text(encoding="utf-8")[:TEXT_CHARACTERS] for path in args.texts]
    work = [
        (
            f"{name}, T = {temperature:g}",
            temperature,
            [template.format(text=t, short=t[:EDIT_CHARACTERS]) for t in texts],
        )
        for temperature in args.temperatures
        for name, template in TASKS.items()
    ]
    work.append((f"open, T = {OPEN_TEMPERATURE:g}", OPEN_TEMPERATURE, list(OPEN)))
    print(f"{'task':22} {'off':>8} {mode:>8} {'gain':>6} {'worst':>6} {'drafted':>8} {'accepted':>8}")
    figures: dict[str, dict[str, float]] = {}
    for label, temperature, prompts in work:
        record = Record(mode=mode)
        for prompt in prompts:
            record.add(measure(llm, prompt, temperature, mode, args))
        row = figures[label] = record.to_dict()
        print(
            f"{label:22} {row['off_tokens_per_s']:8.1f} {row[f'{mode}_tokens_per_s']:8.1f} {row['gain']:6.2f} "
            f"{row['worst_gain']:6.2f} {row['drafted']:8} {row['accepted']:8}",
            flush=True,
        )
    print(json.dumps({"model": args.model, "draft": args.draft, "figures": figures}))


if __name__ == "__main__":
    main()
