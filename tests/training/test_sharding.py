"""A sharded model is run by its parts."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.generation import generate_batch
from fast_dllm.model.hf import HFBackbone
from fast_dllm.training.sharding import decodable
from tiny import tiny_model


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def answers_of(model):
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    decoding = DecodingConfig(max_new_tokens=16, threshold=0.5)
    return generate_batch(HFBackbone(model, "block"), config, [[5, 6, 7], [8] * 10], decoding, ()).answers


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_decodes_as_the_whole_one_and_is_sharded_again():
    whole, model = (tiny_model("llama") for _ in range(2))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model, reshard_after_forward=True)  # embedding, last norm and head
    with torch.no_grad():
        model(torch.tensor([[5]]))
    weights = model.lm_head.weight
    with decodable(model):
        assert type(model.lm_head.weight) is not type(weights)
        assert answers_of(model) == answers_of(whole)
    assert type(model.lm_head.weight) is type(weights)
