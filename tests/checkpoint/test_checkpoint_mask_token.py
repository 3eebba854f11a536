"""The mask token: found where there is one, added where there is none, at the least cost."""

import pytest
import torch

from fast_dllm.checkpoint import AUTOREGRESSIVE, Checkpoint, add_mask_token, find_mask_token, load_checkpoint
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.errors import FastDLLMError
from tiny import tiny_model, tiny_tokenizer


def checkpoint(architecture="llama", *, vocab_size=64, tokens=()):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    model = tiny_model(architecture, vocab_size=vocab_size)
    return Checkpoint(model=model, tokenizer=tokenizer, config=AUTOREGRESSIVE, stop_token_ids=(3,), origin="a test")


@pytest.mark.parametrize("name", ["|<MASK>|", "<|mask|>", "<mask>", "[MASK]"])
def test_a_token_with_a_known_name_is_taken_as_it_is(name):
    plain = checkpoint(tokens=["<other>", name])
    before = plain.model.get_input_embeddings().weight.clone()
    assert add_mask_token(plain) == 55
    assert plain.tokenizer.mask_token == name
    assert torch.equal(plain.model.get_input_embeddings().weight, before)
    assert not plain.mask_token_added


def test_a_named_entry_of_the_vocabulary_is_taken():
    plain = checkpoint(tokens=["<mask>", "<unused>"])
    assert add_mask_token(plain, token="<unused>") == 55
    assert plain.tokenizer.mask_token_id == 55
    assert plain.config.mask_token_id == 55


@pytest.mark.parametrize("architecture", ["llama", "smollm2"])
@pytest.mark.parametrize(("vocab_size", "rows"), [(64, 64), (54, 55)])
def test_a_new_row_is_the_mean_of_those_before_it(architecture, vocab_size, rows):
    plain = checkpoint(architecture, vocab_size=vocab_size)
    before = plain.model.get_input_embeddings().weight[:54].clone()
    assert add_mask_token(plain) == 54
    assert plain.mask_token_added
    embedding, head = plain.model.get_input_embeddings().weight, plain.model.get_output_embeddings().weight
    assert embedding.shape[0] == head.shape[0] == plain.model.config.vocab_size == rows
    assert torch.equal(embedding[:54], before)
    torch.testing.assert_close(embedding[54], before.mean(dim=0))
    torch.testing.assert_close(head[54], head[:54].mean(dim=0))
    assert (head is embedding) == (architecture == "smollm2")


def test_adding_twice_changes_nothing():
    plain = checkpoint()
    assert add_mask_token(plain) == add_mask_token(plain) == 54
    assert len(plain.tokenizer) == 55


def test_the_mask_token_of_the_config_stays():
    adapted = checkpoint()
    adapted.tokenizer = None
    adapted.config = BlockDiffusionConfig(mask_token_id=60)
    assert add_mask_token(adapted) == 60


def test_the_mask_token_is_found_again(tmp_path):
    plain = checkpoint()
    add_mask_token(plain)
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    assert find_mask_token(load_checkpoint(tmp_path).tokenizer) == 54
    assert load_checkpoint(tmp_path, block_size=8).config.mask_token_id == 54


def test_an_unknown_name_and_a_missing_tokenizer_are_refused():
    plain = checkpoint()
    with pytest.raises(FastDLLMError, match="not in the vocabulary"):
        add_mask_token(plain, token="<nowhere>")
    plain.tokenizer = None
    with pytest.raises(FastDLLMError, match="no tokenizer"):
        add_mask_token(plain)


def test_stop_tokens_come_from_the_files_and_the_chat_template(tmp_path):
    model, tokenizer = tiny_model("llama", eos_token_id=1), tiny_tokenizer()
    tokenizer.eos_token = "<unk>"
    model.generation_config.eos_token_id = [1, 2]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # generation config, model config (1 again), tokenizer, and <|im_end|> of the template
    assert load_checkpoint(tmp_path).stop_token_ids == (1, 2, 0, 3)
