import math
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from miniphi.engine import SamplingParams
from miniphi.engine.reference_sampler import ReferenceSampler, draw, prompt_logprob, uniform
from miniphi.engine.sampler import SampledToken, SampleJob, fresh_seed, make_sampler, prompt_logprobs, sample
from miniphi.errors import MiniphiError
from miniphi.kernels import sample_rows
from miniphi.kernels import uniform as native_uniform

VOCAB = 500


def make_logits(seed: int, size: int = VOCAB, scale: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)


class NativeSampler:
    """The native sampler, one row at a time, behind the reference's methods."""

    def __init__(self, params: SamplingParams, **kwargs: Any) -> None:
        self._sampler = make_sampler(params, **kwargs)

    def sample(self, logits: NDArray[np.float32], position: int) -> SampledToken:
        return sample(logits[None], [SampleJob(sampler=self._sampler, row=0, position=position)])[0][0]

    def observe(self, token_id: int) -> None:
        self._sampler.observe(token_id)


IMPLEMENTATIONS: list[Any] = [NativeSampler, ReferenceSampler]
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def sampler(
    implementation: Any, params: SamplingParams, *, prompt: tuple[int, ...] = (), size: int = VOCAB, **kwargs: object
) -> Any:
    return implementation(params, vocab_size=size, prompt_ids=prompt, **kwargs)


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


@both
def test_greedy_takes_the_largest_and_the_lowest_id_among_equals(implementation: Any) -> None:
    logits = np.array([0.0, 2.0, 5.0, 5.0, 1.0], np.float32)
    token = sampler(implementation, SamplingParams(temperature=0), size=5).sample(logits, 0)
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
        drawn = [draw(logits.copy(), params, float(middle)) for middle in middles]  # the native one is compared below
        assert drawn == order.tolist()


@both
def test_repetition_penalty_is_that_of_transformers(implementation: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch = pytest.importorskip("torch")
        processors = pytest.importorskip("transformers.generation.logits_process")
    prompt, output = (3, 4, 4, 9), (4, 11)
    for seed in range(20):
        logits = make_logits(seed, 16)
        ids = torch.tensor([prompt + output])
        expected = processors.RepetitionPenaltyLogitsProcessor(1.7)(ids, torch.from_numpy(logits.copy())[None])[0]
        ours = sampler(implementation, SamplingParams(temperature=0, repetition_penalty=1.7), prompt=prompt, size=16)
        for token in output:
            ours.observe(token)
        scores = logits.copy()
        ours.sample(scores, 2)  # overwrites its argument with the penalised scores
        np.testing.assert_array_equal(scores, expected.numpy())


@both
def test_presence_and_frequency_penalties_count_the_output_only(implementation: Any) -> None:
    ours = sampler(
        implementation,
        SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25),
        prompt=(0, 1),
        size=5,
    )
    for token in (1, 2, 2, 2):
        ours.observe(token)
    scores = np.zeros(5, np.float32)
    assert ours.sample(scores, 4).token_id == 0
    np.testing.assert_allclose(scores, [0, -0.75, -1.25, 0, 0])


@both
def test_logit_bias_comes_after_the_masks(implementation: Any) -> None:
    params = SamplingParams(temperature=0, logit_bias={1: 100.0, 2: 50.0})
    assert (
        sampler(implementation, params, size=4, unused_ids=frozenset({1})).sample(np.zeros(4, np.float32), 0).token_id
        == 2
    )


@both
def test_unused_ids_are_never_drawn(implementation: Any) -> None:
    unused = frozenset(range(0, VOCAB, 2))
    for temperature in (0.0, 1.0, 100.0):
        ours = sampler(implementation, SamplingParams(temperature=temperature), unused_ids=unused, seed=1)
        drawn = {ours.sample(make_logits(i), i).token_id for i in range(300)}
        assert len(drawn) > 100
        assert not drawn & unused


@both
def test_stop_ids_wait_for_min_tokens(implementation: Any) -> None:
    ours = sampler(implementation, SamplingParams(temperature=0, min_tokens=2), size=3, stop_ids=frozenset({2}))
    assert [ours.sample(np.array([0.0, 1.0, 2.0], np.float32), i).token_id for i in range(3)] == [1, 1, 2]


@both
def test_frequencies_follow_the_distribution(implementation: Any) -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    ours = sampler(implementation, SamplingParams(), size=4, seed=7)
    counts = np.bincount([ours.sample(logits.copy(), i).token_id for i in range(8000)], minlength=4)
    expected = 8000 * np.array([0.5, 0.25, 0.125, 0.125])
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


@both
def test_a_draw_depends_on_seed_choice_and_position_only(implementation: Any) -> None:
    def drawn(seed: int, choice: int) -> list[int]:
        ours = sampler(implementation, SamplingParams(), seed=seed, choice=choice)
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


@given(seed=st.integers(0, 2**64 - 1), choice=st.integers(0, 200), position=st.integers(0, 2**40))
def test_both_draw_from_the_same_stream(seed: int, choice: int, position: int) -> None:
    assert native_uniform(seed, choice, position) == uniform(seed, choice, position)


def test_fresh_seeds_differ() -> None:
    assert len({fresh_seed() for _ in range(100)}) == 100


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-12])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        logits = make_logits(seed)
        assert draw(logits.copy(), SamplingParams(temperature=temperature), 0.999) == int(logits.argmax())


@both
def test_logprobs_are_those_of_the_model_before_any_option(implementation: Any) -> None:
    logits = make_logits(5)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    params = SamplingParams(
        temperature=0.5, top_k=3, repetition_penalty=2.0, logit_bias={7: 100.0}, logprobs=4, presence_penalty=1
    )
    token = sampler(implementation, params, prompt=(1, 2), unused_ids=frozenset({int(logits.argmax())})).sample(
        logits, 0
    )
    assert token.token_id == 7
    assert token.logprob == pytest.approx(exact[7], abs=1e-6)
    assert token.top_logprobs is not None
    best = np.argsort(-exact, kind="stable")[:4]
    assert [t.token_id for t in token.top_logprobs] == best.tolist()
    assert [t.logprob for t in token.top_logprobs] == pytest.approx(exact[best].tolist(), abs=1e-6)


@both
def test_logprobs_zero_reports_the_chosen_token_alone(implementation: Any) -> None:
    token = sampler(implementation, SamplingParams(temperature=0, logprobs=0), size=4).sample(
        np.zeros(4, np.float32), 0
    )
    assert token.logprob == pytest.approx(-math.log(4))
    assert token.top_logprobs == ()


def test_prompt_logprob() -> None:
    logits = np.stack([make_logits(6), make_logits(7)])
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    best = logits.argmax(axis=1)
    targets = [int(best[0]), int(best[1] + 1) % VOCAB]
    native = prompt_logprobs(logits, targets)
    for scores in (native, [prompt_logprob(row, target) for row, target in zip(logits, targets, strict=True)]):
        assert [score.token_id for score in scores] == targets
        assert [score.is_greedy for score in scores] == [True, False]
        assert [score.logprob for score in scores] == pytest.approx(exact[[0, 1], targets].tolist(), abs=1e-6)


@both
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_logit_that_is_not_finite_is_an_error(bad: float, temperature: float, implementation: Any) -> None:
    logits = make_logits(1)
    logits[17] = bad
    with pytest.raises(MiniphiError, match=f"1 logits of {VOCAB} that are not finite"):
        sampler(implementation, SamplingParams(temperature=temperature)).sample(logits.copy(), 0)
    with pytest.raises(MiniphiError, match="not finite"):
        prompt_logprob(logits, 0)
    with pytest.raises(MiniphiError, match="not finite"):
        prompt_logprobs(logits[None], [0])


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masking_everything_is_an_error(temperature: float, implementation: Any) -> None:
    ours = sampler(implementation, SamplingParams(temperature=temperature), size=3, unused_ids=frozenset({0, 1, 2}))
    with pytest.raises(MiniphiError, match="every token of the vocabulary is masked"):
        ours.sample(np.zeros(3, np.float32), 0)


def is_undecidable(logits: NDArray[np.float32], params: SamplingParams, chance: float) -> bool:
    """Say whether the draw, or the end of top_p, is within float32 rounding of the border between two tokens."""
    _, cumulative = naive_kept(logits, params)
    _, everything = naive_kept(logits, replace(params, top_p=1.0, min_p=0.0))
    slack = 2e-6
    return bool((abs(cumulative - chance) < slack).any() or (abs(everything - params.top_p) < slack).any())


@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1, 2, 63, 64, 65, 500, 4097, 49152]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 3.0, 10.0]),
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 1e-12, 0.3, 0.7, 1.0, 2.5, 1e6]),
        top_k=st.sampled_from([0, 0, 1, 2, 40, 500, 9999]),
        top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
        min_p=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.5]),
        frequency_penalty=st.sampled_from([0.0, -0.25]),
        logit_bias=st.sampled_from([{}, {0: 2.5}]),
        min_tokens=st.sampled_from([0, 2]),
        seed=st.integers(0, 2**64 - 1),
    ),
    logprobs=st.sampled_from([None, 0, 5]),
    ties=st.booleans(),
)
@settings(deadline=None, max_examples=300)
def test_native_and_reference_choose_the_same_tokens(
    seed: int, size: int, scale: float, params: SamplingParams, *, logprobs: int | None, ties: bool
) -> None:
    prompt = tuple(np.random.default_rng(seed).integers(0, size, 20).tolist())
    masks = {"unused_ids": frozenset({size // 3}), "stop_ids": frozenset({size // 2})} if size > 2 else {}
    native, reference = (
        sampler(each, each_params, prompt=prompt, size=size, seed=params.seed, choice=seed % 3, **masks)
        for each, each_params in ((NativeSampler, replace(params, logprobs=logprobs)), (ReferenceSampler, params))
    )
    for position in range(4):
        logits = make_logits(seed + position, size, scale)
        if ties:
            logits = logits.round()
        scores = logits.copy()
        want = reference.sample(scores, position)
        got = native.sample(logits.copy(), position)
        if got.token_id != want.token_id:
            unscaled = scores * np.float32(params.temperature)
            assert is_undecidable(unscaled, params, uniform(params.seed or 0, seed % 3, position))
            return
        if logprobs is None:
            assert got.logprob is got.top_logprobs is None
            continue
        exact = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
        best = np.lexsort((np.arange(size), -logits))[:logprobs]
        assert got.logprob == pytest.approx(exact[got.token_id], abs=2e-6)
        assert [token.token_id for token in got.top_logprobs] == best.tolist()
        assert [token.logprob for token in got.top_logprobs] == pytest.approx(exact[best].tolist(), abs=2e-6)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_draft_changes_no_token(temperature: float, penalty: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, frequency_penalty=0.3, logprobs=2)
    rows = np.stack([make_logits(seed) for seed in range(6)])
    plain = sampler(NativeSampler, params, prompt=(1, 2), seed=5)
    want = [plain.sample(row.copy(), position) for position, row in enumerate(rows)]
    ids = [token.token_id for token in want]
    for num_true in range(6):
        draft = [*ids[:num_true], (ids[num_true] + 1) % VOCAB, *ids[num_true + 1 :]][:5]
        ours = make_sampler(params, vocab_size=VOCAB, prompt_ids=(1, 2), seed=5)
        other = make_sampler(params, vocab_size=VOCAB, prompt_ids=(3,), seed=6)
        logits = np.concatenate([rows[:1], rows])
        jobs = [SampleJob(sampler=other, row=0, position=0), SampleJob(sampler=ours, row=1, position=0, draft=draft)]
        assert sample(logits, jobs)[1] == want[: num_true + 1]
        # A second call goes on as if the first one had drawn one token after the other.
        if num_true < 5:
            rest = SampleJob(sampler=ours, row=0, position=num_true + 1, draft=ids[num_true + 1 : 5])
            assert sample(rows[num_true + 1 :].copy(), [rest])[0] == want[num_true + 1 :]


def test_rows_that_do_not_exist_or_overlap_are_refused() -> None:
    ours = make_sampler(SamplingParams(), vocab_size=4, prompt_ids=())
    logits = np.zeros((2, 4), np.float32)
    for rows, drafts in (([2], [[]]), ([1], [[3]]), ([0, 0], [[], []]), ([1, 0], [[], []])):
        with pytest.raises(ValueError, match="rows of logits do not exist or belong to another"):
            sample_rows(logits, [ours] * len(rows), rows, [0] * len(rows), drafts)
    with pytest.raises(ValueError, match="not as wide as the logits"):
        sample_rows(np.zeros((2, 5), np.float32), [ours], [0], [0], [[]])
    with pytest.raises(ValueError, match="token id 4 is outside the vocabulary"):
        ours.observe(4)
