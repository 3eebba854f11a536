"""The likeliest token and its probability in our own CPU kernels."""

import pytest
import torch

from fast_dllm.decoding.sampling import greedy
from fast_dllm.model.cpu_ops import CpuOps
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.model.weights import Shape

pytestmark = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))


def own():
    return CpuOps(Shape(1, 4, 2, 16, 64, 1e-5, torch.float32), "block", int8=False)


@pytest.mark.parametrize("vocabulary", [1, 15, 16, 2048, 2049, 5000])
@pytest.mark.parametrize("count", [1, 7])
def test_the_likeliest_token_and_its_probability_are_those_of_torch(count, vocabulary):
    torch.manual_seed(vocabulary)
    logits = 4 * torch.randn(count, vocabulary)
    logits[0, vocabulary // 2 :] = -torch.inf  # whole vectors of them
    logits[0, 0] = 3.0
    ops = own()
    for banned in (None, 0, vocabulary - 1) if vocabulary > 1 else (None,):
        token, probability = ops.likeliest(logits, banned)
        expected_token, expected = greedy(logits, banned, "probability")
        assert torch.equal(token, expected_token)
        torch.testing.assert_close(probability, expected, rtol=2e-6, atol=1e-12)


def test_of_equally_likely_tokens_the_first_is_taken():
    logits = torch.zeros(2, 5000)
    logits[0, [3, 70, 4500]] = logits[1, [4100, 4990]] = 1.0
    token, _ = own().likeliest(logits, banned=3)
    assert token.tolist() == [70, 4100]


def test_a_banned_token_keeps_its_share_of_the_probability():
    logits = torch.zeros(1, 4)
    logits[0, 2] = 200.0  # beyond what a float32 can take the exponential of
    token, probability = own().likeliest(logits, banned=2)
    assert token.item() == 0
    assert 0 <= probability.item() < 1e-37


def test_the_likeliest_hangs_neither_on_neighbours_nor_on_threads():
    torch.manual_seed(0)
    logits = 5 * torch.randn(9, 5000)
    ops, threads = own(), torch.get_num_threads()
    together = ops.likeliest(logits, 7)[1]
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            alone = torch.cat([ops.likeliest(row[None], 7)[1] for row in logits])
            assert torch.equal(alone, together)
    finally:
        torch.set_num_threads(threads)
