"""Load on OpenAI-compatible servers, in turn: time to the first token, time between tokens, throughput.

    miniphi serve MODEL --port 8001 &  llama-server -m FILE.gguf --port 8002 -np 8 &
    python -m benchmarks.serve miniphi=http://127.0.0.1:8001/v1 llama.cpp=http://127.0.0.1:8002/v1

Closed loop: `--concurrency` clients send a request, read its stream to the end and send the next one. Open loop: with
`--rate`, requests come at random moments, so many a second on average, whether or not earlier ones have ended. Every
request has a prompt of its own, made of random words, and asks for exactly `--tokens` tokens (`ignore_eos`); with
`--shared-words` all prompts begin alike, which prefix caches like. Servers take turns, A B A B, at every level.

Prints one table and one line of JSON. Tokens are counted by the server's own usage.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx2

from benchmarks.results import markdown_table, number
from miniphi.atomic_write import atomic_file

WORDS = [
    "time",
    "way",
    "year",
    "work",
    "day",
    "part",
    "place",
    "case",
    "week",
    "system",
    "program",
    "question",
    "point",
    "home",
    "water",
    "room",
    "area",
    "money",
    "story",
]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One request as its client saw it; times in seconds after it was sent."""

    first_s: float
    last_s: float
    num_tokens: int
    prompt_tokens: int
    num_chunks: int

    @property
    def token_s(self) -> float:
        """Mean time of a token after the first one."""
        return (self.last_s - self.first_s) / max(1, self.num_tokens - 1)


@dataclass(kw_only=True)
class Load:
    """All answers of one server at one level."""

    server: str
    level: str
    seconds: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """between chunks of one stream"""
    failures: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Return the figures of the table."""
        firsts = [answer.first_s for answer in self.answers]
        return {
            "tokens_per_s": sum(answer.num_tokens for answer in self.answers) / self.seconds,
            "requests_per_s": len(self.answers) / self.seconds,
            "first_s_p50": quantile(firsts, 0.5),
            "first_s_p95": quantile(firsts, 0.95),
            "token_s_p50": quantile([answer.token_s for answer in self.answers], 0.5),
            "gap_s_p99": quantile(self.gaps_s, 0.99),
            "num_failures": len(self.failures),
        }


def quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that so many of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


async def ask(client: httpx2.AsyncClient, load: Load, prompt: str, num_tokens: int) -> None:
    """Send one request and read its stream."""
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.server in MODELS:
        body["model"] = MODELS[load.server]
    start, times, usage = time.perf_counter(), [], None
    try:
        async with client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                raise httpx2.HTTPError(f"{response.status_code}: {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                if any(choice["delta"].get("content") for choice in event["choices"]):
                    times.append(time.perf_counter() - start)
    except httpx2.HTTPError as error:
        load.failures.append(str(error) or type(error).__name__)
        return
    if not times or usage is None:
        load.failures.append("a stream without text or without usage")
        return
    load.gaps_s += [after - before for before, after in itertools.pairwise(times)]
    load.answers.append(
        Answer(
            first_s=times[0],
            last_s=times[-1],
            num_tokens=usage["completion_tokens"],
            prompt_tokens=usage["prompt_tokens"],
            num_chunks=len(times),
        )
    )


MODELS: dict[str, str] = {}
"""What each server calls its model, asked once"""


class Prompts:
    """Prompts of random words, each once."""

    def __init__(self, num_words: int, num_shared: int, seed: int) -> None:
        self._random = random.Random(seed)
        self._shared = self._words(num_shared)
        self._num_own = max(1, num_words - num_shared)

    def next(self) -> str:
        """Return the next one."""
        return " ".join(part for part in (self._shared, self._words(self._num_own)) if part)

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))


async def closed_loop(url: str, load: Load, prompts: Prompts, args: argparse.Namespace, concurrency: int) -> None:
    """Keep so many requests in flight until each client has sent `--requests`."""
    async with httpx2.AsyncClient(base_url=url, timeout=args.timeout) as client:

        async def one_client() -> None:
            for _ in range(args.requests):
                await ask(client, load, prompts.next(), args.tokens)

        start = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(concurrency)))
        load.seconds += time.perf_counter() - start


async def open_loop(url: str, load: Load, prompts: Prompts, args: argparse.Namespace, rate: float) -> None:
    """Send requests at random moments (a Poisson process)."""
    moments = random.Random(args.seed)
    async with httpx2.AsyncClient(base_url=url, timeout=args.timeout) as client:
        start, tasks = time.perf_counter(), []
        for _ in range(args.requests * max(args.concurrency)):
            tasks.append(asyncio.ensure_future(ask(client, load, prompts.next(), args.tokens)))
            await asyncio.sleep(moments.expovariate(rate))
        await asyncio.gather(*tasks)
        load.seconds += time.perf_counter() - start


async def measure(args: argparse.Namespace, servers: dict[str, str], loads: list[Load]) -> None:
    """Fill `loads`, level by level, the servers taking turns."""
    for name, url in servers.items():
        async with httpx2.AsyncClient(base_url=url, timeout=args.timeout) as client:
            MODELS[name] = (await client.get("models")).json()["data"][0]["id"]
    levels: list[float] = [args.rate] if args.rate else args.concurrency
    for level in levels:
        label = f"{level:g} a second" if args.rate else f"{level:g} at once"
        at_level = {name: Load(server=name, level=label) for name in servers}
        loads += at_level.values()
        for repeat in range(args.repeats):
            for name, url in servers.items():
                prompts = Prompts(args.words, args.shared_words, args.seed + repeat)
                run = open_loop if args.rate else closed_loop
                await run(url, at_level[name], prompts, args, level)  # type: ignore[operator]
                print(f"  {label}, {repeat + 1}/{args.repeats}: {name}", file=sys.stderr)


def rows(loads: Sequence[Load]) -> list[list[str]]:
    """Return the table, its heading first; ratios are of throughput, the first server over each other one."""
    heading = [
        "load",
        "server",
        "tok/s",
        "ratio",
        "first token p50, s",
        "p95, s",
        "per token, ms",
        "gap p99, ms",
        "failed",
    ]
    table, first = [heading], {}
    for load in loads:
        figures = load.summary()
        own = first.setdefault(load.level, figures["tokens_per_s"])
        ratio = "" if own == figures["tokens_per_s"] else f"{own / figures['tokens_per_s']:.2f}"
        times = [number(1000 * figures["token_s_p50"]), number(1000 * figures["gap_s_p99"])]
        firsts = [f"{figures['first_s_p50']:.2f}", f"{figures['first_s_p95']:.2f}"]
        table.append(
            [load.level, load.server, number(figures["tokens_per_s"]), ratio, *firsts, *times, str(len(load.failures))]
        )
    return table


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("servers", nargs="+", metavar="NAME=URL")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N")
    parser.add_argument("--rate", type=float, metavar="R", help="open loop: requests a second")
    parser.add_argument("--requests", type=int, default=2, help="of each client and repetition (default: 2)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each server at every level (default: 3)")
    parser.add_argument("--words", type=int, default=60, help="of a prompt (default: 60)")
    parser.add_argument("--shared-words", type=int, default=0, help="that all prompts begin with (default: 0)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    args = parser.parse_args(argv)
    pairs = [server.partition("=") for server in args.servers]
    if any(not url.startswith(("http://", "https://")) for _, _, url in pairs):
        parser.error("a server is NAME=URL, such as miniphi=http://127.0.0.1:8000/v1")
    return args, {name: url.rstrip("/") + "/" for name, _, url in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    args, servers = parse(argv)
    loads: list[Load] = []
    status = 0
    try:
        asyncio.run(measure(args, servers, loads))
    except KeyboardInterrupt:
        status = 130
    except httpx2.HTTPError as error:
        print(f"a server does not answer: {error}", file=sys.stderr)
        status = 1
    done = [load for load in loads if load.answers]
    if done:
        print(markdown_table(rows(done)))
    for load in loads:
        for failure in load.failures[:1]:
            print(f"{load.server}, {load.level}: {len(load.failures)} failed, the first with {failure}")
    line = json.dumps([{"level": load.level, "server": load.server} | load.summary() | asdict(load) for load in done])
    print(line)
    if args.json:
        with atomic_file(args.json, overwrite=True) as file:
            file.write((line + "\n").encode())
    return status or int(not done)


if __name__ == "__main__":
    sys.exit(main())
