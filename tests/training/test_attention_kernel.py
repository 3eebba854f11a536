"""Our CPU kernel for training attention is attention by its definition, whatever the shapes and whoever sees whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.training import attention_kernel

pytestmark = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))


def dense(query, key, value, mask, scale):
    """Output and logsumexp, in float64."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def pieces_of(mask, sizes):
    """Columns and masks, each piece with the keys that a query of any row sees."""
    masks = mask.split(sizes, dim=2)
    columns = [part.any(dim=(0, 1, 2)).nonzero().flatten() for part in masks]
    return columns, [part[..., seen] for part, seen in zip(masks, columns, strict=True)]


def check(inputs, mask, sizes, scale):
    columns, masks = pieces_of(mask, sizes)
    exact = [x.double().requires_grad_() for x in inputs]
    expected, expected_sums = dense(*exact, mask, scale)
    out, sums = attention_kernel.attend(*inputs, columns, masks, scale)
    torch.testing.assert_close(out.double().transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sums.double().transpose(1, 2), expected_sums, atol=1e-5, rtol=1e-5)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    found = attention_kernel.attend_backward(gradient, *inputs, out, sums, columns, masks, scale)
    of_definition = torch.autograd.grad(expected, exact, gradient.transpose(1, 2).double())
    for one, other in zip(found, of_definition, strict=True):
        torch.testing.assert_close(one.double(), other, atol=5e-5, rtol=1e-4)
    return found


def random_inputs(rows, kv_heads, share, queries, keys, width, value_width, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (kv_heads * share, queries, width), (kv_heads, keys, width), (kv_heads, keys, value_width)
    return [torch.randn(rows, *shape, generator=generator) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 7),
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    keys=st.integers(1, 200),
    width=st.sampled_from([1, 8, 20, 64, 80]),
    value_width=st.sampled_from([4, 16, 64]),
    density=st.sampled_from([0.02, 0.5, 1.0]),
    threads=st.sampled_from([1, 2, 5]),
)
def test_it_is_attention(rows, kv_heads, share, sizes, keys, width, value_width, density, threads):
    queries = sum(sizes)
    generator = torch.Generator().manual_seed(keys)
    mask = torch.rand(rows, 1, queries, keys, generator=generator) < density
    mask[..., torch.arange(queries), torch.arange(queries) % keys] = True  # everybody sees something
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(random_inputs(rows, kv_heads, share, queries, keys, width, value_width), mask, sizes, width**-0.5)
    finally:
        torch.set_num_threads(before)


def test_heads_may_lie_between_one_another():
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_inputs(2, 2, 3, 40, 40, 16, 16)]
    mask = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    found = check(inputs, mask, [32, 8], 0.25)
    assert [x.stride() for x in found] == [x.stride() for x in inputs]


def test_a_hidden_key_counts_for_nothing_however_large_its_score():
    query, key, value = random_inputs(1, 1, 2, 48, 130, 16, 16)
    mask = torch.rand(1, 1, 48, 130, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 0], mask[..., 5:70] = True, False  # more than what is scored together is hidden from all
    key[:, :, 5:70] *= 1e4
    key[:, :, 100] *= 200
    mask[..., 100] = False
    mask[:, :, 7, 100] = True  # of one query, with which the others share its vector
    _, d_key, d_value = check([query, key, value], mask, [48], 0.25)
    assert not d_key[:, :, 5:70].any()
    assert not d_value[:, :, 5:70].any()


def test_a_query_that_sees_nothing_gets_and_gives_nothing():
    inputs = random_inputs(1, 1, 2, 8, 40, 16, 16)
    mask = torch.ones(1, 1, 8, 40, dtype=torch.bool)
    mask[:, :, 3] = False
    every, nothing = torch.arange(40), torch.arange(0)
    rest = torch.arange(8) != 3
    for columns, masks in (
        ([every], [mask]),
        ([every, nothing, every], [mask[:, :, :3], mask[:, :, 3:4, :0], mask[:, :, 4:]]),
    ):
        out, sums = attention_kernel.attend(*inputs, columns, masks, None)
        assert not out[:, 3].any()
        gradients = attention_kernel.attend_backward(torch.ones_like(out), *inputs, out, sums, columns, masks, None)
        assert not gradients[0][:, :, 3].any()
        seen = inputs[0][:, :, rest], *inputs[1:]
        exact = [x.double().requires_grad_() for x in seen]
        expected, _ = dense(*exact, mask[:, :, rest], 0.25)
        torch.testing.assert_close(out[:, rest].double().transpose(1, 2), expected, atol=1e-5, rtol=1e-5)
        found = gradients[0][:, :, rest], *gradients[1:]
        for one, other in zip(found, torch.autograd.grad(expected.sum(), exact), strict=True):
            torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_the_same_threads_give_the_same_bits():
    inputs = random_inputs(1, 3, 3, 300, 300, 64, 64)
    mask = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    columns, masks = pieces_of(mask, [96, 96, 96, 12])
    out, sums = attention_kernel.attend(*inputs, columns, masks, None)
    first, second = (
        attention_kernel.attend_backward(torch.ones_like(out), *inputs, out, sums, columns, masks, None)
        for _ in range(2)
    )
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
