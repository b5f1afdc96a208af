"""Whether a model still finds one sentence in a long text when its cache is quantised: the needle test.

    python -m benchmarks.needle TEXT [--model NAME] [--lengths 512 1024 ...] [--needles 8]

TEXT is what `benchmarks.numerics` takes. A sentence that gives a place its number is put at five depths of a piece of
that text, and the end asks for the number. It counts as found where every token of it is the most probable one, so that
greedy decoding writes it. The same prompts go through every format. Prints one table of the shares that were found, and
of the mean log-probability of the number, then one JSON line.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import miniphi
from benchmarks.numerics import read_text
from miniphi import LLM
from miniphi.errors import MiniphiError

FORMATS = ("f32", "f16", "q8", "q4")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLACES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Dublin", "Tunis", "Quito", "Riga", "Perth")
FACT = " The secret number of {place} is {number}."
QUESTION = "\n\nWhat is the secret number of {place}? The secret number of {place} is"
ROOM = 64
"""Tokens of a context that needle and question may take."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One length of context and one format of the cache; `num_needles` of them were hidden."""

    length: int
    kv_type: str
    num_needles: int
    found: float
    logprob: float


def prompts(words: Sequence[str], llm: LLM, length: int, count: int) -> Iterator[tuple[str, str]]:
    """Yield prompts of about `length` tokens and what should follow: `count` needles at each depth."""
    rng = random.Random(length)
    tokens_per_word = len(llm.tokenizer.encode(" ".join(words[:2000]))) / min(len(words), 2000)
    num_words = int((length - ROOM) / tokens_per_word * 0.95)  # a piece may be denser than the beginning
    for number in range(count):
        first = (len(words) - num_words) * number // count
        hay = words[first : first + num_words]
        for depth in DEPTHS:
            place, secret = PLACES[number % len(PLACES)], str(rng.randrange(10000, 100000))
            at = int(depth * num_words)
            text = " ".join(hay[:at]) + FACT.format(place=place, number=secret) + " " + " ".join(hay[at:])
            yield text + QUESTION.format(place=place), f" {secret}"


def measure(llm: LLM, kv_type: str, words: Sequence[str], length: int, count: int) -> Row:
    """Ask for every needle of one length."""
    scores = [llm.loglikelihood(prompt, answer) for prompt, answer in prompts(words, llm, length, count)]
    return Row(
        length=length,
        kv_type=kv_type,
        num_needles=len(scores),
        found=sum(score.is_greedy for score in scores) / len(scores),
        logprob=sum(score.logprob for score in scores) / len(scores),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default=miniphi.llm.DEFAULT_MODEL)
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 2048, 4096, 8000], metavar="N")
    parser.add_argument("--needles", type=int, default=8, help="at each of five depths (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        words = read_text(args.text).split()
    except (OSError, ValueError) as error:
        parser.error(f"{args.text}: cannot be read as text: {error}")
    if min(args.lengths) <= ROOM or args.needles < 1:
        parser.error(f"a context has more than {ROOM} tokens, and there is at least one needle")
    if len(words) < max(args.lengths):  # more than enough: a word takes a token or more
        parser.error(f"{args.text} has {len(words):,} words; a context of {max(args.lengths):,} tokens needs as many")
    rows: list[Row] = []
    print(f"{'context':>8} {'cache':>6} {'needles':>8} {'found':>7} {'log-probability':>16}")
    for length in args.lengths:
        for kv_type in FORMATS:
            llm = miniphi.load(args.model, kv_type=kv_type, context=length + ROOM)
            row = measure(llm, kv_type, words, length, args.needles)
            rows.append(row)
            print(f"{length:8,} {kv_type:>6} {row.num_needles:8} {row.found:7.1%} {row.logprob:16.3f}", flush=True)
    print(json.dumps({"model": args.model, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    try:
        main()
    except MiniphiError as error:
        sys.exit(f"needle: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
