"""How far SmolLM2 in 4 bits is from transformers on the same dequantised weights, and from llama.cpp on the same file.

    python -m benchmarks.numerics TEXT [--windows N]

TEXT is a text file or .jsonl.gz of {"page": ...}, as lm-eval stores WikiText-2. Perplexity over windows of 512 tokens,
agreement of the most probable token, and the mean Kullback-Leibler divergence from transformers.
"""

import argparse
import gzip
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.llama_cpp import LlamaCpp
from miniphi.checkpoint import Checkpoint, open_checkpoint
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.program import load_program
from miniphi.models import resolve
from miniphi.tokenizer import Tokenizer

WINDOW = 512
Logits = Callable[[NDArray[np.int32]], NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One engine against transformers."""

    perplexity: float
    reference_perplexity: float
    top1: float
    kl_divergence: float

    @property
    def perplexity_error(self) -> float:
        """Relative."""
        return self.perplexity / self.reference_perplexity - 1


def read_text(path: Path) -> str:
    """Return a text file, or the pages of a .jsonl.gz one after the other."""
    if path.suffixes[-2:] != [".jsonl", ".gz"]:
        return path.read_text("utf-8")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return "".join(json.loads(line)["page"] for line in lines)


def windows(path: Path, tokenizer: Tokenizer, count: int) -> Iterator[NDArray[np.int32]]:
    """Yield `count` windows of token ids, evenly spread over the text."""
    ids = np.array(tokenizer.encode(read_text(path)), np.int32)
    for start in np.linspace(0, len(ids) - WINDOW, count).astype(int):
        yield ids[start : start + WINDOW]


def miniphi_logits(checkpoint: Checkpoint, **options: object) -> Logits:
    """All logits of a window in this engine."""
    program = load_program(checkpoint, context=WINDOW, max_logit_rows=WINDOW, **options)

    def run(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        size = len(ids)
        return program.run(
            Batch(
                token_ids=ids,
                positions=np.arange(size, dtype=np.int32),
                query_starts=np.array([0, size], np.int32),
                context_lens=np.array([size], np.int32),
                block_tables=np.arange(WINDOW // KV_BLOCK_SIZE, dtype=np.int32)[None],
                use_long_factors=np.zeros(1, np.bool_),
                logit_rows=np.arange(size, dtype=np.int32),
            )
        )

    return run


def transformers_logits(checkpoint: Checkpoint) -> Logits:
    """All logits of a window in transformers, float32, on the dequantised weights."""
    config = LlamaConfig(**checkpoint.config.to_hf(), attn_implementation="eager")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    weights = {name: torch.from_numpy(tensor.to_float32()) for name, tensor in checkpoint.tensors.items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    model.eval()

    def run(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        with torch.no_grad():
            return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()

    return run


def llama_cpp_logits(path: Path, vocab_size: int) -> Logits:
    """All logits of a window in llama.cpp."""
    model = LlamaCpp(path, vocab_size=vocab_size, num_threads=2, context=WINDOW)

    def run(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        model.reset()
        return model.step(ids.tolist(), range(len(ids)), [0] * len(ids), range(len(ids)))

    return run


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(engines: dict[str, Logits], reference: Logits, texts: Iterable[NDArray[np.int32]]) -> dict[str, Agreement]:
    """Run every engine and the reference on the same windows."""
    nll = dict.fromkeys(("reference", *engines), 0.0)
    same, divergence = dict.fromkeys(engines, 0), dict.fromkeys(engines, 0.0)
    count = 0
    for ids in texts:
        expected, targets = log_softmax(reference(ids)[:-1]), ids[1:]
        rows = np.arange(len(targets))
        count += len(targets)
        nll["reference"] -= expected[rows, targets].sum()
        for name, engine in engines.items():
            found = log_softmax(engine(ids)[:-1])
            nll[name] -= found[rows, targets].sum()
            same[name] += int((found.argmax(axis=-1) == expected.argmax(axis=-1)).sum())
            divergence[name] += float((np.exp(expected) * (expected - found)).sum())
    return {
        name: Agreement(
            perplexity=float(np.exp(nll[name] / count)),
            reference_perplexity=float(np.exp(nll["reference"] / count)),
            top1=same[name] / count,
            kl_divergence=divergence[name] / count,
        )
        for name in engines
    }


def main() -> None:
    """Print the table of docs/numerics.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=32)
    args = parser.parse_args()
    path = resolve("smollm2-135m-instruct")
    checkpoint = open_checkpoint(path)
    source = checkpoint.tokenizer_source
    if source is None or source[0] != "gguf":
        sys.exit("the model has no GGUF tokenizer")
    tokenizer = Tokenizer.from_gguf(source[1], source=str(path))
    engines = {f"miniphi, {kv} cache": miniphi_logits(checkpoint, kv_type=kv) for kv in ("f32", "f16", "q8", "q4")}
    engines["llama.cpp, f16 cache"] = llama_cpp_logits(path, checkpoint.config.vocab_size)
    results = compare(engines, transformers_logits(checkpoint), windows(args.text, tokenizer, args.windows))
    first = next(iter(results.values()))
    print(f"transformers float32: perplexity {first.reference_perplexity:.4f} over {args.windows} windows of {WINDOW}")
    print(f"{'engine':24} {'perplexity':>10} {'error':>8} {'top-1 same':>10} {'KL':>9}")
    for name, result in results.items():
        print(
            f"{name:24} {result.perplexity:10.4f} {result.perplexity_error:+8.3%} "
            f"{result.top1:10.2%} {result.kl_divergence:9.2e}"
        )
    print(json.dumps({name: vars(result) for name, result in results.items()}))


if __name__ == "__main__":
    main()
