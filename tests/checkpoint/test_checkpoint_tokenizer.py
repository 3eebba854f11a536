import shutil

import pytest
from peft import LoraConfig, get_peft_model

from fast_dllm.checkpoint import load_checkpoint, load_tokenizer_of, save_adapter
from fast_dllm.errors import FastDLLMError
from tiny import save_tiny, tiny_model
from tiny_gguf import TOKENS, write_gguf

TEXT = "what is 12 + aa?"


def adapter(tmp_path):
    base = load_checkpoint(save_tiny(tmp_path / "base", adapted=False))
    save_adapter(get_peft_model(base.model, LoraConfig(target_modules=["q_proj"])), tmp_path / "lora", checkpoint=base)
    return tmp_path / "lora"


def adapter_without_tokenizer(tmp_path):
    directory = adapter(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    return directory


SOURCES = {
    "directory": lambda tmp_path: save_tiny(tmp_path / "model", adapted=True),
    "gguf": lambda tmp_path: write_gguf(tmp_path / "tiny.gguf", tiny_model("smollm2", vocab_size=len(TOKENS))),
    "adapter": adapter,
    "adapter of a base with the tokenizer": adapter_without_tokenizer,
}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_tokenizer_alone_is_the_checkpoints(tmp_path, kind):
    source = SOURCES[kind](tmp_path)
    alone, whole = load_tokenizer_of(source), load_checkpoint(source).tokenizer
    assert alone(TEXT)["input_ids"] == whole(TEXT)["input_ids"]
    assert alone.chat_template == whole.chat_template


def test_no_tokenizer_is_an_error(tmp_path):
    source = save_tiny(tmp_path / "model", adapted=False)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(FastDLLMError, match="has no tokenizer"):
        load_tokenizer_of(source)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FastDLLMError, match="no such file or directory"):
        load_tokenizer_of(source)


def test_the_tokenizer_of_a_base_that_has_moved(tmp_path):
    source = adapter_without_tokenizer(tmp_path)
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    alone, whole = load_tokenizer_of(source, base=moved), load_checkpoint(source, base=moved).tokenizer
    assert alone(TEXT)["input_ids"] == whole(TEXT)["input_ids"]
    with pytest.raises(FastDLLMError, match="no such file or directory"):
        load_tokenizer_of(source)
