import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fast_dllm.noise import EPSILON, draw_views


@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 5),
    block_size=st.sampled_from([1, 4, 32]),
    seed=st.integers(0, 2**31),
    keep=st.floats(0, 1),
)
def test_complementary_views_hide_every_response_token_exactly_once(rows, blocks, block_size, seed, keep):
    loss_mask = torch.rand(rows, blocks * block_size, generator=torch.Generator().manual_seed(seed + 1)) < keep
    views = draw_views(loss_mask, block_size, torch.Generator().manual_seed(seed))
    assert torch.equal(views[0] ^ views[1], loss_mask)
    assert not (views[0] & views[1]).any()


def test_noise_is_a_function_of_the_generator_alone():
    loss_mask = torch.ones(2, 64, dtype=torch.bool)
    torch.manual_seed(1)
    first = draw_views(loss_mask, 32, torch.Generator().manual_seed(7))
    torch.manual_seed(2)
    assert torch.equal(first, draw_views(loss_mask, 32, torch.Generator().manual_seed(7)))
    assert not torch.equal(first, draw_views(loss_mask, 32, torch.Generator().manual_seed(8)))


def test_one_view_without_complementary_masks():
    assert draw_views(torch.ones(1, 32, dtype=torch.bool), 32, complementary=False).shape == (1, 1, 32)


def test_mask_ratio_is_uniform_over_blocks():
    ratios = draw_views(torch.ones(1, 4000 * 256, dtype=torch.bool), 256, torch.Generator().manual_seed(0))[0]
    per_block = ratios.view(4000, 256).float().mean(1)
    expected = torch.linspace(EPSILON, 1, 11)[1:-1]
    assert torch.quantile(per_block, torch.arange(0.1, 0.95, 0.1)).tolist() == pytest.approx(
        expected.tolist(), abs=0.04
    )
