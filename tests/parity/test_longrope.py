"""LongRoPE across its border: which factor set a sequence uses, and that the other never leaks in."""

from pathlib import Path

import numpy as np
import pytest

from miniphi.engine import Engine, Request, SamplingParams
from tests.parity.test_transformers import close, generate, greedy
from tests.parity.tiny_models import Sequences, load, longrope, make_phi3, random_ids, reference_logits, run_alone

BORDER = 64


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("longrope")
    model = make_phi3(
        folder, original_max_position_embeddings=BORDER, max_position_embeddings=1024, rope_parameters=longrope(48)
    )
    return model, load(folder, max_logit_rows=512)


def test_factor_sets_on_both_sides_of_the_border(pair) -> None:
    model, program = pair
    for length in (BORDER - 1, BORDER, BORDER + 1, BORDER + 2, 2 * BORDER, 300):
        ids = random_ids(length, seed=length)
        close(run_alone(program, ids, long=length > BORDER), reference_logits(model, ids))


def test_the_other_set_is_another_model(pair) -> None:
    model, program = pair
    ids = random_ids(BORDER + 1)
    assert np.abs(run_alone(program, ids, long=False) - reference_logits(model, ids)).max() > 0.1


def test_chunked_prefill_beyond_the_border(pair) -> None:
    model, program = pair
    ids = random_ids(200)
    whole = run_alone(program, ids, long=True)
    close(whole, reference_logits(model, ids))
    for chunk in (7, 32, 63, 64, 65, 128):
        np.testing.assert_array_equal(run_alone(program, ids, chunk=chunk, long=True), whole)


def test_short_and_long_in_one_batch(pair) -> None:
    model, program = pair
    prompts = [random_ids(50, seed=1), random_ids(150, seed=2), random_ids(64, seed=3)]
    batch = Sequences(program, 3, 160)
    logits = batch.step(dict(enumerate(prompts)), long={s: len(ids) > BORDER for s, ids in enumerate(prompts)})
    for s, ids in enumerate(prompts):
        close(logits[s], reference_logits(model, ids))


def test_hf_policy_switches_as_transformers_does(pair) -> None:
    model, program = pair
    prompts = [random_ids(BORDER - 6, seed=1), random_ids(20, seed=2), random_ids(BORDER + 3, seed=3)]
    assert generate(program, prompts, 14, rope_policy="hf") == [greedy(model, prompt, 14) for prompt in prompts]


def test_auto_policy_never_switches_half_way(pair) -> None:
    model, program = pair
    prompt = random_ids(BORDER - 6)
    ends_beyond = generate(program, [prompt], 14)[0]
    tokens = np.concatenate([prompt, ends_beyond]).astype(np.int32)
    expected = run_alone(program, tokens, long=True)
    assert ends_beyond == expected[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert generate(program, [prompt], 6)[0] == greedy(model, prompt, 6)


def test_forced_policies(pair) -> None:
    _, program = pair
    prompt = random_ids(40)
    for policy, long in (("short", False), ("long", True)):
        answer = generate(program, [prompt], 40, rope_policy=policy)[0]
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        assert answer == run_alone(program, tokens, long=long)[len(prompt) - 1 : -1].argmax(axis=-1).tolist()


def test_prefix_cache_keeps_the_sets_apart(pair) -> None:
    model, program = pair
    engine = Engine(program)
    prompt = random_ids(60)
    for count in (2, 30, 2):  # short, long, short: the third must not see the second's keys
        engine.submit(Request(token_ids=tuple(prompt.tolist()), params=SamplingParams(temperature=0, max_tokens=count)))
        answer = []
        while engine.has_work:
            answer += [output.token_id for output in engine.step()]
        if count == 2:
            assert answer == greedy(model, prompt, 2)
        else:
            tokens = np.concatenate([prompt, answer]).astype(np.int32)
            assert answer == run_alone(program, tokens, long=True)[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert engine.stats.num_reused_tokens == 32  # only the third found a block, the first's


def test_the_real_border(tmp_path: Path) -> None:
    model = make_phi3(
        tmp_path,
        num_hidden_layers=2,
        original_max_position_embeddings=4096,
        max_position_embeddings=131072,
        rope_parameters=longrope(48),
    )
    program = load(tmp_path, max_logit_rows=1024, max_batch_tokens=1024, context=8192)
    for length in (4096, 4097):
        ids = random_ids(length, seed=length)
        close(run_alone(program, ids, chunk=1024, long=length > 4096), reference_logits(model, ids))
