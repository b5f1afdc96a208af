"""Float32 checkpoints against transformers: the same logits, whatever the architecture and however the work is cut."""

from pathlib import Path

import numpy as np
import pytest

from miniphi.engine import Engine, Request, SamplingParams
from miniphi.engine.program import Program
from tests.parity.tiny_models import (
    Sequences,
    load,
    longrope,
    make_llama,
    make_phi3,
    random_ids,
    reference_logits,
    run_alone,
)

TOLERANCE = 1e-4
"""Largest difference of a logit; logits here are of size 10."""

ARCHITECTURES = {
    "phi3 as 3-mini-4k": (make_phi3, {"sliding_window": 48}),
    "phi3 as 3-mini-128k": (
        make_phi3,
        {"original_max_position_embeddings": 512, "max_position_embeddings": 4096, "rope_parameters": longrope(48)},
    ),
    "phi3 as 4-mini": (
        make_phi3,
        {
            "hidden_size": 768,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 4096,
            "rope_parameters": longrope(48) | {"partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    "phi3 as 3-medium": (
        make_phi3,
        {
            "hidden_size": 512,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 4096,
            "rope_parameters": longrope(64),
        },
    ),
    "llama as SmolLM2": (
        make_llama,
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda name: name.replace(" ", "-"))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """The model in transformers, and the program that runs what it saved."""
    make, overrides = ARCHITECTURES[request.param]
    folder = tmp_path_factory.mktemp("model")
    model = make(folder, **overrides)
    return model, load(folder, max_logit_rows=512, num_kv_blocks=64)


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert np.abs(theirs).max() > 3  # a model that says nothing would agree with anything
    assert np.abs(ours - theirs).max() <= TOLERANCE


def test_every_length(pair) -> None:
    model, program = pair
    for length in (
        *range(1, 12),
        31,
        32,
        33,
        47,
        48,
        49,
        50,
        63,
        64,
        65,
        96,
        127,
        128,
        129,
        200,
        255,
        256,
        257,
        299,
        300,
    ):
        ids = random_ids(length, seed=length)
        close(run_alone(program, ids), reference_logits(model, ids))


def test_reference_program_is_the_same_model(pair) -> None:
    model, program = pair
    ids = random_ids(70)
    close(run_alone(program, ids, reference=True), reference_logits(model, ids))


def test_every_chunk_size_gives_the_same_bits(pair) -> None:
    model, program = pair
    ids = random_ids(100)
    whole = run_alone(program, ids)
    close(whole, reference_logits(model, ids))
    for chunk in (1, 2, 3, 5, 7, 8, 16, 31, 32, 33, 64, 99):
        np.testing.assert_array_equal(run_alone(program, ids, chunk=chunk), whole)


def test_mixed_batches_give_the_same_bits(pair) -> None:
    model, program = pair
    lengths = (1, 9, 40, 77, 130)
    prompts = [random_ids(length, seed=length) for length in lengths]
    batch = Sequences(program, len(prompts), 160)
    first = batch.step({s: ids[: len(ids) - 1] for s, ids in enumerate(prompts) if len(ids) > 1})
    last = batch.step({s: ids[-1:] for s, ids in enumerate(prompts)})
    for s, ids in enumerate(prompts):
        alone = run_alone(program, ids)
        close(alone, reference_logits(model, ids))
        together = np.concatenate([first[s], last[s]]) if len(ids) > 1 else last[s]
        np.testing.assert_array_equal(together, alone)


def test_a_few_queries_of_several_long_sequences_give_the_same_bits(pair) -> None:
    _, program = pair
    tails = {0: 1, 1: 4, 2: 3, 3: 2}  # of contexts longer than a chunk of attention, one of them shorter
    prompts = [random_ids(length, seed=length) for length in (270, 300, 290, 20)]
    batch = Sequences(program, len(prompts), 320)
    for s, tail in tails.items():
        batch.step({s: prompts[s][:-tail]})
    together = batch.step({s: prompts[s][-tail:] for s, tail in tails.items()})
    for s, tail in tails.items():
        np.testing.assert_array_equal(together[s], run_alone(program, prompts[s])[-tail:])


def greedy(model, ids: np.ndarray, count: int) -> list[int]:
    """transformers' own generation, without a cache: every token from the whole text so far."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(reference_logits(model, np.array(tokens, np.int32))[-1].argmax()))
    return tokens[len(ids) :]


def generate(program: Program, prompts: list[np.ndarray], count: int, **request: object) -> list[list[int]]:
    """Greedy answers of an engine that gets all prompts at once."""
    engine = Engine(program)
    params = SamplingParams(temperature=0, max_tokens=count)
    ids = [engine.submit(Request(token_ids=tuple(p.tolist()), params=params, **request)) for p in prompts]
    answers: dict[str, list[int]] = {i: [] for i in ids}
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id].append(output.token_id)
    return [answers[i] for i in ids]


def test_engine_generates_the_same_tokens(pair) -> None:
    model, program = pair
    prompts = [random_ids(length, seed=length) for length in (3, 60, 140)]
    assert generate(program, prompts, 12) == [greedy(model, prompt, 12) for prompt in prompts]


def test_prefix_reuse_gives_the_same_tokens(pair) -> None:
    model, program = pair
    prefix = random_ids(100)
    prompts = [np.concatenate([prefix, random_ids(n, seed=n)]) for n in (5, 20)]
    engine = Engine(program)
    for prompt in prompts:
        engine.submit(Request(token_ids=tuple(prompt.tolist()), params=SamplingParams(temperature=0, max_tokens=8)))
        answer = []
        while engine.has_work:
            answer += [output.token_id for output in engine.step()]
        assert answer == greedy(model, prompt, 8)
    assert engine.stats.num_reused_tokens == 96  # three whole blocks of the common prefix


def test_saved_names(tmp_path: Path) -> None:
    model = make_phi3(tmp_path)
    assert "model.layers.0.self_attn.qkv_proj.weight" in model.state_dict()
    program = load(tmp_path)
    assert program.config.num_parameters == sum(p.numel() for p in model.parameters())
