"""A process that owns one engine and times it on request, so that engines share neither memory nor dependencies.

    python -m benchmarks.worker RUNNER OPTIONS

RUNNER is a module of benchmarks.runners, OPTIONS the JSON of its arguments. Every line of standard input is a request
such as {"work": "prefill", "num_tokens": 512}; every line of standard output answers one: {"value": ...,
"peak_bytes": ...} or {"error": ...}, after which the process ends. `Worker` is the parent's side.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_END_TIMEOUT_S = 10


class WorkerError(RuntimeError):
    """An engine could not do what it was asked to."""


class Worker:
    """The parent's hold on one process."""

    def __init__(self, python: str, runner: str, options: Mapping[str, object]) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", runner, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=_ROOT,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    def ask(self, work: str, **arguments: object) -> tuple[float, int]:
        """Return the measured value and the process's peak memory in bytes. Raises WorkerError if there is none."""
        requests, answers = self._process.stdin, self._process.stdout
        if requests is None or answers is None:
            raise WorkerError("the worker has no pipes")
        try:
            requests.write(json.dumps({"work": work, **arguments}) + "\n")
            requests.flush()
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().strip().splitlines()[-1:] or ["no message"]
            raise WorkerError(f"the process ended with status {status}: {last[0]}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"], answer["peak_bytes"]

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.terminate()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def peak_memory(status: str) -> int:
    """Return the most bytes that a process had in memory, mapped files included, from its /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what an engine prints is not an answer
    try:
        runner = importlib.import_module(f"benchmarks.runners.{sys.argv[1]}").Runner(**json.loads(sys.argv[2]))
        works = {"prefill": runner.prefill, "decode": runner.decode}
        for line in sys.stdin:
            request = json.loads(line)
            value = works[request.pop("work")](**request)
            status = Path("/proc/self/status")
            peak = peak_memory(status.read_text()) if status.exists() else 0
            answers.write(json.dumps({"value": value, "peak_bytes": peak}) + "\n")
    except Exception as error:
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}".replace("\n", " ")}) + "\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
