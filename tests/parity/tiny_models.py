"""Tiny random models of the real architectures, saved by transformers, and a driver that runs them here."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedModel

from miniphi.checkpoint import open_checkpoint
from miniphi.engine.batch import KV_BLOCK_SIZE, Batch
from miniphi.engine.program import Program, load_program

VOCAB_SIZE = 320
BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def longrope(half: int, seed: int = 0) -> dict[str, object]:
    """Random factor lists in the range of the real ones."""
    rng = np.random.default_rng(seed)
    return {
        "rope_type": "longrope",
        "short_factor": sorted(rng.uniform(1, 3, half).tolist()),
        "long_factor": sorted(rng.uniform(1, 60, half).tolist()),
    }


def make_phi3(folder: Path, **overrides: object) -> PreTrainedModel:
    """Save a random Phi-3 and return it, float32, in evaluation mode."""
    config = Phi3Config(**(BASE | {"sliding_window": None} | overrides))
    return _save(Phi3ForCausalLM, config, folder)


def make_llama(folder: Path, **overrides: object) -> PreTrainedModel:
    """Save a random Llama and return it."""
    return _save(LlamaForCausalLM, LlamaConfig(**(BASE | overrides)), folder)


def _save(model_class: type[PreTrainedModel], config: object, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            # variance is kept from layer to layer, so that attention is far from uniform and errors show;
            # logits have a standard deviation of 3
            gain = 3.0 if "lm_head" in name or "embed" in name else 1.0
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * gain * parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return model


def load(folder: Path, **options: object) -> Program:
    """Open what transformers saved, float32 cache unless told otherwise."""
    return load_program(open_checkpoint(folder), **({"kv_type": "f32", "num_threads": 2} | options))


def random_ids(length: int, seed: int = 0) -> NDArray[np.int32]:
    """Token ids without the special ones."""
    return np.random.default_rng(seed).integers(3, VOCAB_SIZE, length).astype(np.int32)


def reference_logits(model: PreTrainedModel, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """All logits of one sequence, [length, vocab]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].float().numpy()


class Sequences:
    """Runs sequences side by side through a program, each on blocks of its own in scrambled order."""

    def __init__(self, program: Program, num_sequences: int, max_length: int) -> None:
        self.program = program
        num_blocks = -(-max_length // KV_BLOCK_SIZE)
        order = np.random.default_rng(7).permutation(program.num_kv_blocks)[: num_sequences * num_blocks]
        self.tables = order.reshape(num_sequences, num_blocks).astype(np.int32)
        self.lengths = [0] * num_sequences

    def step(
        self, tokens: dict[int, NDArray[np.int32]], *, long: bool | dict[int, bool] = False, reference: bool = False
    ) -> dict[int, NDArray[np.float32]]:
        """Feed tokens to some sequences in one step; return all their logits."""
        chosen = list(tokens)
        counts = [len(tokens[s]) for s in chosen]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        positions = [np.arange(self.lengths[s], self.lengths[s] + len(tokens[s])) for s in chosen]
        for s in chosen:
            self.lengths[s] += len(tokens[s])
        flags = [long[s] if isinstance(long, dict) else long for s in chosen]
        batch = Batch(
            token_ids=np.concatenate([tokens[s] for s in chosen]).astype(np.int32),
            positions=np.concatenate(positions).astype(np.int32),
            query_starts=starts,
            context_lens=np.array([self.lengths[s] for s in chosen], np.int32),
            block_tables=self.tables[chosen],
            use_long_factors=np.array(flags),
            logit_rows=np.arange(starts[-1], dtype=np.int32),
        )
        logits = self.program.run(batch, reference=reference)
        return {s: logits[starts[i] : starts[i + 1]] for i, s in enumerate(chosen)}


def run_alone(
    program: Program, ids: NDArray[np.int32], *, chunk: int = 512, long: bool = False, reference: bool = False
) -> NDArray[np.float32]:
    """All logits of one sequence, prefilled in chunks."""
    sequences = Sequences(program, 1, len(ids))
    parts = [
        sequences.step({0: ids[start : start + chunk]}, long=long, reference=reference)[0]
        for start in range(0, len(ids), chunk)
    ]
    return np.concatenate(parts)
