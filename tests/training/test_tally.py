"""What the log says of losses."""

import math

import torch

from fast_dllm.training.tally import Tally, read


def test_a_lost_ar_loss_does_not_hide_the_others():
    tally = Tally(block_size=8)
    losses, is_ar = torch.tensor([1.0, 3.0, math.inf]), torch.tensor([False, False, True])
    hidden_share, place = torch.tensor([0.25, 1.0, 0.0]), torch.tensor([0, 7, 1])
    tally.add(losses, is_ar, hidden_share, place, torch.tensor([2]))
    means, tokens = read(tally.take())
    hidden = {"loss_hidden_25": 1.0, "loss_hidden_100": 3.0}
    assert means == {**hidden, "loss_place_1": 1.0, "loss_place_4": 3.0, "loss_ar": math.inf}
    assert tokens == 2
