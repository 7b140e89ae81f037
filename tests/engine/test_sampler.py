"""The sampler against a plain numpy one: filters, penalties, masks, and the distribution of its draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flashmoe import _native
from flashmoe.engine.params import SamplingParams
from flashmoe.engine.sampler import Sampler, top_logprobs
from flashmoe.errors import ConfigError

F = np.float32
VOCAB = 248_320
Floats = NDArray[np.float32]


def penalised(logits: Floats, params: SamplingParams, prompt: list[int], generated: list[int]) -> Floats:
    """Repetition (prompt and generated tokens, once each), then presence and frequency (generated ones)."""
    out = logits.astype(F)
    for token in set(prompt) | set(generated):
        factor = F(params.repetition_penalty)
        out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
    for token, count in Counter(generated).items():
        out[token] -= F(params.presence_penalty) + F(params.frequency_penalty) * F(count)
    return out


def distribution(logits: Floats, params: SamplingParams, allowed: list[int] | None = None) -> NDArray[Any]:
    """Probability of every token: temperature, top-k, top-p over what is left, min-p, renormalised.

    Settings and quotients are float32 as in the core: ten equal tokens and a top-p of 0.3 stand on the edge.
    """
    ids = np.arange(len(logits)) if allowed is None else np.array(sorted(allowed))
    order = ids[np.argsort(-logits[ids], kind="stable")]  # equal logits: the lower id first
    if params.temperature == 0:
        order, weights = order[:1], np.ones(1)
    else:
        order = order[: params.top_k or None]
        inverse = F(1) / max(F(params.temperature), F(1e-30))
        weights = np.exp(((logits[order] - logits[order[0]]) * inverse).astype(np.float64))
        sums = np.cumsum([0.0, *weights])
        kept = (sums[:-1] < float(F(params.top_p)) * sums[-1]) & (weights >= float(F(params.min_p)))
        kept[0] = True
        order, weights = order[kept], weights[kept]
    out = np.zeros(len(logits))
    out[order] = weights / weights.sum()
    return out


def mask_of(allowed: list[int], vocab: int) -> NDArray[np.uint32]:
    """One bit a token."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[allowed] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def draws(logits: Floats, params: SamplingParams, count: int) -> list[int]:
    """Tokens drawn one after another from the same logits."""
    sampler = Sampler(params, [])
    return [sampler.sample(logits) for _ in range(count)]


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.8, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -0.25]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    seed=st.integers(0, 2**64 - 1),
)
LOGITS = st.lists(
    st.sampled_from([-90.0, -3.0, -0.5, 0.0, 0.25, 1.0, 1.5, 4.0, 80.0]), min_size=1, max_size=70
)


@given(logits=LOGITS, params=PARAMS, data=st.data())
@settings(max_examples=300, deadline=None)
def test_every_draw_is_possible_and_has_the_probability_it_says(
    logits: list[float], params: SamplingParams, data: st.DataObject
) -> None:
    tokens = st.integers(0, len(logits) - 1)
    prompt = data.draw(st.lists(tokens, max_size=5))
    allowed = data.draw(st.none() | st.lists(tokens, min_size=1, unique=True))
    row, generated = np.array(logits, F), list[int]()
    sampler = Sampler(params, prompt)
    for _ in range(4):
        token = sampler.sample(row, None if allowed is None else mask_of(allowed, len(row)))
        expected = distribution(penalised(row, params, prompt, generated), params, allowed)
        assert expected[token] > 0
        # Candidates below e^-35 of the largest are left out: 1e-13 in all.
        assert sampler._native.probability == pytest.approx(expected[token], rel=1e-6)
        generated.append(token)


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 20,000 draws: 5 standard deviations above its mean would be a wrong sampler."""
    logits = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])).astype(F)
    settings_ = (
        {},
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.85},
        {"min_p": 0.2},
        {"temperature": 3.0},
    )
    for options in settings_:
        params = SamplingParams(seed=5, **options)
        expected = distribution(logits, params) * 20_000
        seen = np.bincount(draws(logits, params, 20_000), minlength=len(logits))
        possible = expected > 0
        assert seen[~possible].sum() == 0
        freedom = possible.sum() - 1
        chi_square = (np.square(seen - expected)[possible] / expected[possible]).sum()
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom), options


def test_successive_draws_and_seeds_are_independent() -> None:
    logits = np.zeros(4, F)
    pairs = np.reshape(draws(logits, SamplingParams(seed=1), 16_000), (-1, 2))
    firsts = [draws(logits, SamplingParams(seed=seed), 1)[0] for seed in range(8_000)]
    for ids, cells in ((pairs @ [4, 1], 16), (np.array(firsts), 4)):
        expected = len(ids) / cells
        chi_square = (np.square(np.bincount(ids, minlength=cells) - expected) / expected).sum()
        assert chi_square < cells - 1 + 5 * np.sqrt(2 * (cells - 1))


def test_a_seed_fixes_the_draws() -> None:
    logits = np.random.default_rng(1).normal(size=500).astype(F)
    first = draws(logits, SamplingParams(seed=7), 50)
    assert first == draws(logits, SamplingParams(seed=7), 50)
    assert first != draws(logits, SamplingParams(seed=8), 50)
    free = Sampler(SamplingParams(), [])
    assert [free.sample(logits) for _ in range(50)] == draws(logits, SamplingParams(seed=free.seed), 50)


def test_a_draw_depends_on_its_number_alone() -> None:
    """Other logits before it make no difference: the third draw is the third draw."""
    logits = np.random.default_rng(2).normal(size=300).astype(F)
    disturbed = Sampler(SamplingParams(seed=3), [])
    for _ in range(2):
        disturbed.sample(np.zeros(10, F))
    assert disturbed.sample(logits) == draws(logits, SamplingParams(seed=3), 3)[2]


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_most_likely_token_and_the_lower_of_equals(params: dict[str, Any]) -> None:
    logits = np.array([1.0, 7.0, -2.0, 7.0, 6.99], F)
    seen = set(draws(logits, SamplingParams(seed=1, **params), 40))
    assert seen == ({1, 3} if "min_p" in params else {1})  # min-p keeps both of the largest


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    logits = np.array([3.0, 2.5, 0.0], F)
    greedy = {"temperature": 0.0, "seed": 0}
    once = Sampler(SamplingParams(presence_penalty=1.0, **greedy), prompt=[0, 0, 0])
    assert [once.sample(logits) for _ in range(4)] == [0, 1, 0, 0]
    often = Sampler(SamplingParams(frequency_penalty=0.4, **greedy), prompt=[1])
    assert [often.sample(logits) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_repetition_counts_the_prompt_and_pushes_negative_logits_down() -> None:
    positive, negative = np.array([3.0, 2.0], F), np.array([-1.0, -1.5], F)
    params = SamplingParams(temperature=0.0, repetition_penalty=2.0, seed=0)
    for logits in (positive, negative):
        assert Sampler(params, [0]).sample(logits) == 1
        assert Sampler(params, []).sample(logits) == 0
    far = Sampler(params, [-5, 1_000_000])  # ids that the logits do not have
    assert far.sample(positive) == 0


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = np.array([3.0, 2.0, 1.0], F)
    sampler = Sampler(SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, seed=0), [0, 1])
    for _ in range(5):
        sampler.sample(logits)
    np.testing.assert_array_equal(logits, [3, 2, 1])


@given(vocab=st.integers(1, 200), seed=st.integers(0, 2**32 - 1), greedy=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_mask_lets_no_forbidden_token_through(vocab: int, seed: int, greedy: bool) -> None:
    """Also when the forbidden ones are far more likely, and in the last, partly used word of the mask."""
    rng = np.random.default_rng(seed)
    allowed = rng.choice(vocab, rng.integers(1, vocab + 1), replace=False).tolist()
    logits = (50 * rng.random(vocab)).astype(F)
    logits[allowed] -= 100
    sampler, mask = (
        Sampler(SamplingParams(temperature=0.0 if greedy else 1.5, seed=seed), []),
        mask_of(allowed, vocab),
    )
    assert {sampler.sample(logits, mask) for _ in range(20)} <= set(allowed)


def test_a_mask_hides_logits_of_any_size_but_not_broken_ones() -> None:
    sampler, mask = Sampler(SamplingParams(seed=0), []), mask_of([1], 3)
    assert sampler.sample(np.array([np.inf, 0.0, np.inf], F), mask) == 1
    with pytest.raises(RuntimeError, match="not a number"):
        sampler.sample(np.array([np.nan, 0.0, 1.0], F), mask)


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        ([1.0, 2.0], [], "no token is allowed"),
        ([1.0, np.nan], None, "not a number"),
        ([-np.inf, -np.inf], None, "infinite"),
        ([0.0, np.inf], None, "infinite"),
        ([5.0, -np.inf], [1], "infinite"),
        ([], None, "no logits"),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_cannot_be_sampled_is_an_error(
    logits: list[float], mask: list[int] | None, message: str, temperature: float
) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=0), [])
    allowed = None if mask is None else mask_of(mask, len(logits))
    with pytest.raises(RuntimeError, match=message):
        sampler.sample(np.array(logits, F), allowed)
    # The failed call counts for nothing: the next draw is the first.
    row = np.zeros(50, F)
    assert sampler.sample(row) == draws(row, SamplingParams(temperature=temperature, seed=0), 1)[0]


def test_infinitely_unlikely_tokens_are_never_drawn() -> None:
    logits = np.full(100, -np.inf, F)
    logits[[7, 30]] = -3.0
    assert set(draws(logits, SamplingParams(seed=2, temperature=5.0), 100)) == {7, 30}


def test_bad_arrays_are_refused() -> None:
    sampler, logits = Sampler(SamplingParams(seed=0), []), np.zeros(40, F)
    for mask in (np.zeros(1, np.uint32), np.empty(0, np.uint32)):
        with pytest.raises(ValueError, match="mask of allowed tokens"):
            sampler.sample(logits, mask)
    for bad in (logits.astype(np.float64), logits[::2], logits.reshape(1, -1)):
        with pytest.raises(TypeError):
            sampler.sample(bad)
    with pytest.raises(TypeError):
        sampler.sample(logits, np.ones(2, np.int64))


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 20, "top_p": 0.95, "temperature": 0.6}, {}]
)
def test_a_real_vocabulary(params: dict[str, Any]) -> None:
    logits = np.random.default_rng(3).normal(0, 3, VOCAB).astype(F)
    logits[[VOCAB - 1, 5]] = 30
    allowed = mask_of([5, 77, VOCAB - 1], VOCAB)
    sampler = Sampler(SamplingParams(seed=1, presence_penalty=1.5, **params), list(range(1000)))
    for mask in (None, allowed):
        for _ in range(3):
            assert sampler.sample(logits, mask) in (5, VOCAB - 1)
    uniform = Sampler(SamplingParams(seed=1), [])
    ids = np.array([uniform.sample(np.zeros(VOCAB, F)) for _ in range(4)])
    assert len(set(ids.tolist())) == 4  # of 248,320 equals
    assert uniform._native.probability == pytest.approx(1 / VOCAB)


def test_a_tiny_temperature_is_nearly_greedy() -> None:
    logits = np.array([1.0, 1.0001, 1.00005], F)
    for temperature in (1e-3, 1e-6, 1e-30, 1e-44):
        seen = draws(logits, SamplingParams(temperature=temperature, seed=0), 30)
        assert seen == [1] * 30 or temperature == 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"top_k": -1},
        {"top_k": 1.5},
        {"presence_penalty": float("inf")},
        {"repetition_penalty": 0.0},
        {"max_tokens": 0},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
    ids=str,
)
def test_settings_out_of_range_name_themselves(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SamplingParams(**options)


def test_the_native_sampler_takes_what_the_settings_allow() -> None:
    _native.Sampler(100.0, (1 << 31) - 1, 1.0, 1.0, 100.0, -100.0, 100.0, (1 << 64) - 1).sample(
        np.zeros(3, F)
    )


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 5000, VOCAB])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_top_logprobs(vocab: int, count: int) -> None:
    logits = np.random.default_rng(vocab).normal(0, 4, vocab).astype(F)
    logits[vocab // 2] = logits.max()  # a tie
    best, log_sum = top_logprobs(logits, count)
    wide = logits.astype(np.float64)
    expected = np.log(np.exp(wide - wide.max()).sum()) + wide.max()
    assert log_sum == pytest.approx(expected, abs=1e-6)
    order = np.argsort(-logits, kind="stable")[:count]
    assert [token for token, _ in best] == order.tolist()
    np.testing.assert_allclose([value for _, value in best], wide[order] - expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_log_probabilities_of_broken_logits_are_refused(bad: float) -> None:
    with pytest.raises(RuntimeError):
        top_logprobs(np.array([0.0, bad], F), 1)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_every_instruction_set_draws_the_same(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a draw depends on the last bit of a sum: top-p without top-k, half of the tokens hidden."""
    rng = np.random.default_rng(4)
    logits, mask = rng.normal(0, 2, 10_007).astype(F), rng.integers(0, 2**32, 313, dtype=np.uint32)
    seen = rng.integers(0, len(logits), 300).tolist()

    def run(name: str) -> list[Any]:
        monkeypatch.setenv("FLASHMOE_CPU", name)
        out: list[Any] = []
        for options in (
            {},
            {"top_p": 0.5},
            {"top_p": 0.9, "min_p": 0.01},
            {"top_k": 50},
            {"temperature": 0.0},
        ):
            sampler = Sampler(SamplingParams(seed=9, repetition_penalty=1.2, **options), seen)
            for allowed in (None, mask) * 20:
                out += [sampler.sample(logits, allowed), sampler._native.probability]
        return [*out, _native.top_logprobs(logits, 20)]

    assert run(isa) == run("scalar")
