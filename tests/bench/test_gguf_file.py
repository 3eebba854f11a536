"""The GGUF written for llama.cpp, against the one transformers reads."""

import pytest
import torch

from fast_dllm.bench.gguf_file import _interleave, gguf_of, write_f16
from fast_dllm.errors import FastDLLMError
from tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("heads", [1, 3])
def test_rows_that_rotate_together_become_neighbours(heads):
    half = 4
    rows = torch.arange(heads * 2 * half)[:, None].expand(-1, 5)
    interleaved = _interleave(rows, heads)[:, 0].view(heads, half, 2)
    for head in range(heads):
        first = head * 2 * half
        assert interleaved[head].tolist() == [[first + i, first + half + i] for i in range(half)]


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(FastDLLMError, match="qwen2"):
        write_f16(tiny_model("qwen2"), tiny_tokenizer(), tmp_path / "model.gguf")


def test_a_model_without_a_gguf_file_is_refused(tmp_path):
    with pytest.raises(FastDLLMError, match="no GGUF"):
        gguf_of(str(tmp_path))
