import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from miniphi.engine import SamplingParams
from miniphi.engine.sampler import SequenceSampler, draw, fresh_seed, prompt_logprob, uniform
from miniphi.errors import MiniphiError

VOCAB = 500


def make_logits(seed: int, size: int = VOCAB, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


def sampler(
    params: SamplingParams, *, prompt: tuple[int, ...] = (), size: int = VOCAB, **kwargs: object
) -> SequenceSampler:
    return SequenceSampler(params, vocab_size=size, prompt_ids=prompt, **kwargs)  # type: ignore[arg-type]


def naive_kept(logits: NDArray[np.float32], params: SamplingParams) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Say which tokens may be drawn, in order, and their cumulative probabilities."""
    scores = logits.astype(np.float64) / params.temperature
    order = np.lexsort((np.arange(scores.size), -scores))
    if params.top_k:
        order = order[: params.top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    before = (np.cumsum(weights) - weights) / weights.sum()
    keep = (before < params.top_p) & (weights >= params.min_p)
    return order[keep], np.cumsum(weights[keep]) / weights[keep].sum()


def test_greedy_takes_the_largest_and_the_lowest_id_among_equals() -> None:
    logits = np.array([0.0, 2.0, 5.0, 5.0, 1.0], np.float32)
    token = sampler(SamplingParams(temperature=0), size=5).sample(logits, 0)
    assert token.token_id == 2
    assert token.logprob is None


@given(
    seed=st.integers(0, 50),
    size=st.sampled_from([2, 63, 64, 65, 500, 512, 515, 3000, 5001]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 10.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 40, 500, 9999]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    chance=st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None, max_examples=200)
def test_the_draw_is_the_inverse_of_the_cumulative_distribution(
    *, seed: int, size: int, scale: float, temperature: float, top_k: int, top_p: float, min_p: float, chance: float
) -> None:
    logits = make_logits(seed, size, scale)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept, cumulative = naive_kept(logits, params)
    place = np.flatnonzero(kept == draw(logits.copy(), params, chance))
    slack = 1e-5  # float32 weights against float64
    if place.size == 0:
        # Only a token at the border of top_p, where float32 and float64 may differ by one token, may be outside.
        assert top_p < 1
        assert chance > 1 - 2 / size or cumulative[-1] > 1 - slack
        return
    low = cumulative[place[0] - 1] if place[0] else 0.0
    assert low - slack <= chance <= cumulative[place[0]] + slack


def test_filters_keep_what_transformers_keeps() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        processors = pytest.importorskip("transformers.generation.logits_process")
    for seed in range(20):
        logits = make_logits(seed)
        params = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.03)
        scores = torch.from_numpy(logits.copy())[None]
        for processor in (
            processors.TemperatureLogitsWarper(0.7),
            processors.TopKLogitsWarper(50),
            processors.TopPLogitsWarper(0.9),
            processors.MinPLogitsWarper(0.03),
        ):
            scores = processor(torch.zeros((1, 1), dtype=torch.long), scores)
        chances = torch.softmax(scores[0].double(), -1).numpy()
        order = np.lexsort((np.arange(VOCAB), -chances))[: np.count_nonzero(chances)]
        middles = np.cumsum(chances[order]) - chances[order] / 2
        drawn = [draw(logits.copy(), params, float(middle)) for middle in middles]
        assert drawn == order.tolist()


def test_repetition_penalty_is_that_of_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        processors = pytest.importorskip("transformers.generation.logits_process")
    prompt, output = (3, 4, 4, 9), (4, 11)
    for seed in range(20):
        logits = make_logits(seed, 16)
        ids = torch.tensor([prompt + output])
        expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.from_numpy(logits.copy())[None])[0]
        ours = sampler(SamplingParams(temperature=0, repetition_penalty=1.7), prompt=prompt, size=16)
        for token in output:
            ours.observe(token)
        scores = logits.copy()
        ours.sample(scores, 2)  # overwrites its argument with the penalised scores
        np.testing.assert_array_equal(scores, expected.numpy())


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    ours = sampler(SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25), prompt=(0, 1), size=5)
    for token in (1, 2, 2, 2):
        ours.observe(token)
    scores = np.zeros(5, np.float32)
    assert ours.sample(scores, 4).token_id == 0
    np.testing.assert_allclose(scores, [0, -0.75, -1.25, 0, 0])


def test_logit_bias_comes_after_the_masks() -> None:
    params = SamplingParams(temperature=0, logit_bias={1: 100.0, 2: 50.0})
    assert sampler(params, size=4, unused_ids=frozenset({1})).sample(np.zeros(4, np.float32), 0).token_id == 2


def test_unused_ids_are_never_drawn() -> None:
    unused = frozenset(range(0, VOCAB, 2))
    for temperature in (0.0, 1.0, 100.0):
        ours = sampler(SamplingParams(temperature=temperature), unused_ids=unused, seed=1)
        drawn = {ours.sample(make_logits(i), i).token_id for i in range(300)}
        assert len(drawn) > 100
        assert not drawn & unused


def test_stop_ids_wait_for_min_tokens() -> None:
    ours = sampler(SamplingParams(temperature=0, min_tokens=2), size=3, stop_ids=frozenset({2}))
    assert [ours.sample(np.array([0.0, 1.0, 2.0], np.float32), i).token_id for i in range(3)] == [1, 1, 2]


def test_frequencies_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    ours = sampler(SamplingParams(), size=4, seed=7)
    counts = np.bincount([ours.sample(logits.copy(), i).token_id for i in range(8000)], minlength=4)
    expected = 8000 * np.array([0.5, 0.25, 0.125, 0.125])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


def test_a_draw_depends_on_seed_choice_and_position_only() -> None:
    def drawn(seed: int, choice: int) -> list[int]:
        ours = sampler(SamplingParams(), seed=seed, choice=choice)
        return [ours.sample(make_logits(i), i).token_id for i in range(50)]

    assert drawn(1, 0) == drawn(1, 0)
    assert len({tuple(drawn(seed, choice)) for seed in (1, 2, -1) for choice in (0, 1)}) == 6


def test_uniform_numbers() -> None:
    numbers = np.array([uniform(3, 0, i) for i in range(4000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.05
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)
    # Written down so that a change of the generator, which changes everyone's seeds, does not go unnoticed.
    assert uniform(42, 1, 2) == 0.9353024073545013


def test_fresh_seeds_differ() -> None:
    assert len({fresh_seed() for _ in range(100)}) == 100


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-12])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        logits = make_logits(seed)
        assert draw(logits.copy(), SamplingParams(temperature=temperature), 0.999) == int(logits.argmax())


def test_logprobs_are_those_of_the_model_before_any_option() -> None:
    logits = make_logits(5)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(
        temperature=0.5, top_k=3, repetition_penalty=2.0, logit_bias={7: 100.0}, logprobs=4, presence_penalty=1
    )
    token = sampler(params, prompt=(1, 2), unused_ids=frozenset({int(logits.argmax())})).sample(logits, 0)
    assert token.token_id == 7
    assert token.logprob == pytest.approx(exact[7], abs=1e-6)
    assert token.top_logprobs is not None
    best = np.argsort(-exact, kind="stable")[:4]
    assert [t.token_id for t in token.top_logprobs] == best.tolist()
    assert [t.logprob for t in token.top_logprobs] == pytest.approx(exact[best].tolist(), abs=1e-6)


def test_logprobs_zero_reports_the_chosen_token_alone() -> None:
    token = sampler(SamplingParams(temperature=0, logprobs=0), size=4).sample(np.zeros(4, np.float32), 0)
    assert token.logprob == pytest.approx(-math.log(4))
    assert token.top_logprobs == ()


def test_prompt_logprob() -> None:
    logits = make_logits(6)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    best = int(logits.argmax())
    assert prompt_logprob(logits, best).is_greedy
    other = prompt_logprob(logits, (best + 1) % VOCAB)
    assert not other.is_greedy
    assert other.logprob == pytest.approx(exact[(best + 1) % VOCAB], abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_is_an_error(bad: float, temperature: float) -> None:
    logits = make_logits(1)
    logits[17] = bad
    with pytest.raises(MiniphiError, match=f"1 logits of {VOCAB} that are not finite"):
        sampler(SamplingParams(temperature=temperature)).sample(logits.copy(), 0)
    with pytest.raises(MiniphiError, match="not finite"):
        prompt_logprob(logits, 0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masking_everything_is_an_error(temperature: float) -> None:
    ours = sampler(SamplingParams(temperature=temperature), size=3, unused_ids=frozenset({0, 1, 2}))
    with pytest.raises(MiniphiError, match="every token of the vocabulary is masked"):
        ours.sample(np.zeros(3, np.float32), 0)
