"""The rate after the prompt has neither the prompt's forward in it nor what that forward revealed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench import decode as clocked
from fast_dllm.bench.decode import Continuation, decode
from fast_dllm.config import DecodingConfig
from tiny import save_tiny

PROMPT = list(range(10, 45))  # two blocks of 16 and three tokens
SETTINGS = {
    "ar": {"block_size": 1, "small_block_size": 1},
    "verified": {"verify": True, "threshold": 0.0},
    "fused": {"verify": False, "sub_block_cache": "none", "fused_commit": True, "threshold": 0.0},
    "block": {"verify": False, "threshold": 0.0},
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    path = save_tiny(tmp_path_factory.mktemp("clock") / "causal", adapted=True, context_attention="causal")
    return BlockDiffusionLM.from_pretrained(path, backbone="hf")


@pytest.fixture
def forwards(monkeypatch, lm):
    """Lets a forward take a second, and nothing else any time; the positions that each of them ran over."""
    ran = []
    forward = lm.backbone.forward

    def count(batch, *rest, **named):
        ran.append(batch)
        return forward(batch, *rest, **named)

    monkeypatch.setattr(lm.backbone, "forward", count)
    monkeypatch.setattr(clocked, "time", SimpleNamespace(perf_counter=lambda: float(len(ran))))
    return ran


@pytest.mark.parametrize("sure", [False, True])
@pytest.mark.parametrize("way", SETTINGS)
def test_the_forward_of_the_prompt_is_off_the_clock_with_what_it_revealed(lm, forwards, way, sure):
    decoding = DecodingConfig(max_new_tokens=20, stop_token_ids=(), **SETTINGS[way])
    head = lm.checkpoint.model.get_output_embeddings()
    certain = 100 * F.one_hot(torch.tensor(7), head.weight.shape[0])
    # Of a model that always says one token, every draft is kept.
    hook = head.register_forward_hook(lambda _, __, logits: logits * 0 + certain if sure else logits)
    found = decode(lm, [PROMPT], decoding)
    hook.remove()
    (steps,) = found.result.reveal_steps
    assert found.seconds == found.forwards == len(forwards) - 1 == found.result.total.forwards - 1
    assert found.tokens == sum(step > 0 for step in steps)


def test_a_prompt_committed_without_a_look_at_masks_is_off_the_clock(lm, forwards, monkeypatch):
    monkeypatch.setattr(lm.backbone, "draft_budget", 1)  # room to draft nothing but the next token
    found = decode(lm, [PROMPT], DecodingConfig(max_new_tokens=20, stop_token_ids=(), **SETTINGS["verified"]))
    assert found.result.total.forwards_by_kind == {"commit": 20}
    assert (found.seconds, found.tokens) == (19, 19)


@pytest.mark.parametrize("way", ["ar", "verified"])
def test_of_a_prompt_in_the_cache_the_last_position_is_off_the_clock_too(lm, forwards, way):
    decoding = DecodingConfig(max_new_tokens=20, stop_token_ids=(), **SETTINGS[way])
    continuation = Continuation(lm, [PROMPT] * 2, [decoding])
    before = len(forwards)
    pace = continuation.decode(decoding)
    assert pace.seconds == len(forwards) - before - 1
    assert pace.tokens <= 2 * 19


def test_a_prompt_shorter_than_a_block_is_on_the_clock(lm, forwards):
    found = decode(lm, [PROMPT[:5]], DecodingConfig(max_new_tokens=20, stop_token_ids=(), **SETTINGS["block"]))
    assert (found.seconds, found.tokens) == (len(forwards), 20)
