"""A tiny model, trained here, solves a task with block diffusion as well as autoregressively."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fast_dllm import BlockDiffusionLM
from fast_dllm.checkpoint import AUTOREGRESSIVE, Checkpoint, save_checkpoint
from fast_dllm.data.chat import Sample
from fast_dllm.training.adapt import adapt
from fast_dllm.training.options import AdaptOptions
from tiny import tiny_model, tiny_tokenizer

END, SEPARATOR, LETTERS = 3, 4, range(10, 18)
LENGTH = 4


def problem(rng: random.Random) -> tuple[list[int], list[int]]:
    """Repeat each letter of a word: a b c | a a b b c c."""
    word = [rng.choice(LETTERS) for _ in range(LENGTH)]
    return [*word, SEPARATOR], [letter for letter in word for _ in range(2)] + [END]


def accuracy(model: BlockDiffusionLM, **settings: object) -> tuple[float, float]:
    rng = random.Random("held out")
    problems = [problem(rng) for _ in range(50)]
    result = model.generate(
        [prompt for prompt, _ in problems], max_new_tokens=20, stop_token=END, return_dict=True, **settings
    )
    right = [answer == expected for answer, (_, expected) in zip(result.answers, problems, strict=True)]
    return sum(right) / len(right), result.total.tokens_per_forward


@pytest.mark.timeout(300)
def test_block_diffusion_learns_what_autoregression_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = tiny_model("llama", hidden_size=64, intermediate_size=128).config
    blank = Checkpoint(
        model=AutoModelForCausalLM.from_config(shape).eval(),
        tokenizer=tiny_tokenizer(),
        config=AUTOREGRESSIVE,
        stop_token_ids=(END,),
        origin="random",
    )
    save_checkpoint(blank, tmp_path / "blank")
    rng = random.Random("train")
    samples = []
    for _ in range(4000):
        prompt, answer = problem(rng)
        samples.append(Sample(input_ids=prompt + answer, loss_mask=[False] * len(prompt) + [True] * len(answer)))
    common = {"batch_size": 32, "learning_rate": 3e-3, "lora_rank": 0, "block_size": 8, "max_length": 32}
    common |= {"save_every": 10_000, "dtype": "float32"}
    ar = AdaptOptions(objective="ar", steps=300, **common)
    adapt(tmp_path / "blank", samples, ar, tmp_path / "ar")
    diffusion = AdaptOptions(steps=300, **common)
    adapt(tmp_path / "ar", samples, diffusion, tmp_path / "diffusion")

    ar_accuracy, ar_parallelism = accuracy(BlockDiffusionLM.from_pretrained(tmp_path / "ar"))
    model = BlockDiffusionLM.from_pretrained(tmp_path / "diffusion")
    diffusion_accuracy, parallelism = accuracy(model, small_block_size=8, threshold=0.9)
    assert ar_accuracy >= 0.9
    assert ar_parallelism == 1.0
    assert diffusion_accuracy >= ar_accuracy - 0.04
    assert parallelism > 1.5
