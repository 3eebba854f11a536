"""Logits to (token, confidence)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding_cases import MASK, Case, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.sampling import SamplingParameters, confidence_of, greedy, sample

BANNED = 3


def parameters(uniform, temperature=1.0, top_k=0, top_p=1.0):
    n = len(uniform)
    return SamplingParameters(
        torch.full((n,), temperature, dtype=torch.float64),
        torch.full((n,), top_k),
        torch.full((n,), top_p, dtype=torch.float64),
        torch.tensor(uniform, dtype=torch.float64),
    )


def naive_distribution(logits, banned, temperature, top_k, top_p):
    """Probability of each token, by the book: temperature, then top-k, then the nucleus of what is left."""
    allowed = [t for t in range(len(logits)) if t != banned]
    weights = {t: math.exp(logits[t] / temperature) for t in allowed}
    order = sorted(allowed, key=lambda t: (-weights[t], t))[: top_k or None]
    total = sum(weights[t] for t in order)
    kept, mass = [], 0.0
    for t in order:
        kept.append(t)
        mass += weights[t] / total
        if mass >= top_p:
            break
    total = sum(weights[t] for t in kept)
    return {t: weights[t] / total for t in kept}


@settings(max_examples=200)
@given(
    st.lists(st.integers(-400, 400), min_size=6, max_size=6, unique=True),
    st.floats(0.0, 0.999),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.integers(0, 7),
    st.sampled_from([0.1, 0.37, 0.62, 0.93, 1.0]),
)
def test_sampling_equals_inverse_transform_over_the_truncated_distribution(hundredths, u, temperature, top_k, top_p):
    logits = [x / 100 for x in hundredths]
    distribution = naive_distribution(logits, BANNED, temperature, top_k, top_p)
    token, confidence = sample(
        torch.tensor([logits], dtype=torch.float64), BANNED, "probability", parameters([u], temperature, top_k, top_p)
    )
    reached, expected = 0.0, None
    for expected, probability in distribution.items():  # noqa: B007
        reached += probability
        if reached >= u:
            break
    assert token.item() == expected
    assert confidence.item() == pytest.approx(distribution[expected], abs=1e-12)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 4, 1.0), (1.5, 0, 0.8), (2.0, 5, 0.9)]
)
def test_draws_follow_the_truncated_distribution(temperature, top_k, top_p):
    draws = 20_000
    logits = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    uniform = torch.rand(draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    drawn, _ = sample(logits.expand(draws, -1), None, "probability", parameters(uniform, temperature, top_k, top_p))
    counts = torch.bincount(drawn, minlength=8).tolist()
    distribution = naive_distribution(logits.tolist(), None, temperature, top_k, top_p)
    chi_square = sum((counts[t] - draws * p) ** 2 / (draws * p) for t, p in distribution.items())
    assert sum(counts[t] for t in distribution) == draws
    assert chi_square < 30  # 7 degrees of freedom: p = 1e-4


def test_draw_of_almost_one_stays_among_the_kept_tokens():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0]], dtype=torch.float32)
    almost = parameters([1 - 2**-53], top_k=2)
    token, confidence = sample(logits, None, "probability", almost)
    assert token.item() == 1
    assert confidence.item() > 0


def test_draw_of_zero_takes_the_likeliest():
    token, _ = sample(torch.tensor([[0.0, 5.0, 1.0]]), None, "probability", parameters([0.0]))
    assert token.item() == 1


def test_low_temperature_approaches_greedy():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    sampled, _ = sample(logits, None, "probability", parameters([0.5] * 50, temperature=1e-3))
    assert torch.equal(sampled, greedy(logits, None, "probability")[0])


def test_top_k_of_one_is_greedy():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    sampled, confidence = sample(logits, None, "probability", parameters([0.99] * 50, top_k=1))
    assert torch.equal(sampled, greedy(logits, None, "probability")[0])
    assert torch.equal(confidence, torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
def test_banned_token_is_never_chosen_even_when_its_logit_dominates(measure):
    logits = torch.zeros(100, 6, dtype=torch.float64)
    logits[:, BANNED] = 50.0
    uniform = torch.linspace(0, 0.999, 100).tolist()
    assert not (greedy(logits, BANNED, measure)[0] == BANNED).any()
    drawn, _ = sample(logits, BANNED, measure, parameters(uniform, top_k=1))
    assert not (drawn == BANNED).any()
    drawn, _ = sample(logits, BANNED, measure, parameters(uniform))
    assert not (drawn == BANNED).any()


def test_greedy_confidence_keeps_the_banned_token_in_the_denominator():
    logits = torch.tensor([[1.0, 2.0, 0.0, 4.0]], dtype=torch.float64)
    token, confidence = greedy(logits, BANNED, "probability")
    assert token.item() == 1
    assert confidence.item() == pytest.approx(logits.softmax(-1)[0, 1].item())


def test_sampled_confidence_is_of_the_distribution_without_the_banned_token():
    logits = torch.tensor([[1.0, 2.0, 0.0, 40.0]], dtype=torch.float64)
    _, confidence = sample(logits, BANNED, "probability", parameters([0.0]))
    assert confidence.item() == pytest.approx(logits[:, :3].softmax(-1)[0, 1].item())


def test_confidence_measures_by_hand():
    probability = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64)
    first, second = torch.tensor([[0]]), torch.tensor([[1]])
    assert confidence_of(probability, first, "probability").item() == 0.5
    assert confidence_of(probability, first, "margin").item() == 0.25
    assert confidence_of(probability, second, "margin").item() == -0.25
    # H = 1.5 bits of at most 2.
    assert confidence_of(probability, first, "entropy").item() == pytest.approx(0.25)


def test_certain_and_uniform_distributions_bound_the_confidence():
    certain = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    uniform = torch.full((1, 4), 0.25)
    token = torch.tensor([[1]])
    for measure in ("probability", "margin", "entropy"):
        assert confidence_of(certain, token, measure).item() == pytest.approx(1.0)
    assert confidence_of(uniform, token, "margin").item() == pytest.approx(0.0)
    assert confidence_of(uniform, token, "entropy").item() == pytest.approx(0.0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("shift", [True, False])
def test_mask_token_is_never_generated_by_a_model_that_prefers_it(temperature, shift):
    favourite = next(iter(_most_common_tokens(shift)))
    # The model's favourite token becomes the mask token.
    config = BlockDiffusionConfig(mask_token_id=favourite, block_size=8, token_shift=shift)
    decoding = DecodingConfig(max_new_tokens=40, threshold=0.5, temperature=temperature, stop_token_ids=())
    answer = Case("qwen3", config, [1, 2, 4], decoding).decode().answers[0]
    assert len(answer) == 40
    assert favourite not in answer


def _most_common_tokens(shift):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, token_shift=shift)
    answer = Case("qwen3", config, tokens(0, 3), DecodingConfig(max_new_tokens=60, stop_token_ids=())).decode()
    return sorted(set(answer.answers[0]), key=answer.answers[0].count, reverse=True)


def test_nucleus_ends_with_the_token_that_reaches_top_p_exactly():
    # Four equal tokens: the first two hold exactly one half.
    token, confidence = sample(
        torch.zeros(1, 4, dtype=torch.float64), None, "probability", parameters([0.99], top_p=0.5)
    )
    assert (token.item(), confidence.item()) == (1, 0.5)


@pytest.mark.parametrize("measure", ["probability", "margin", "entropy"])
def test_a_row_of_a_large_vocabulary_is_bitwise_what_it_is_alone(measure):
    """With several threads torch.sum adds a single row of more than 32,768 numbers up in parts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        logits = 3 * torch.randn(4, 49_152, generator=torch.Generator().manual_seed(0))
        settings = [torch.tensor([0.7, 1.0, 1.3, 0.9]), torch.tensor([0, 50, 0, 40_000])]
        settings += [torch.tensor([1.0, 0.9, 0.8, 0.95]), torch.tensor([0.3, 0.6, 0.9, 0.999])]

        def chosen(rows):
            drawn = sample(logits[rows], BANNED, measure, SamplingParameters(*(field[rows] for field in settings)))
            return *greedy(logits[rows], BANNED, measure), *drawn

        together, alone = chosen(slice(None)), [chosen(slice(i, i + 1)) for i in range(4)]
        for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))
    finally:
        torch.set_num_threads(threads)
