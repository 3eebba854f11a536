"""What cannot be loaded is refused in one line that names the place and the remedy."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.errors import FastDLLMError
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def refusal(source, **options):
    with pytest.raises(FastDLLMError) as error:
        load_checkpoint(source, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def edit_config(directory, *, remove=(), **changes):
    path = directory / "config.json"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key not in remove}
    path.write_text(json.dumps({**values, **changes}))


def edit_weights(directory, change):
    path = directory / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def truncate(path, keep):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def put_nan(weights):
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")


def to_pickle(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def lose_a_shard(directory):
    (directory / "model.safetensors").unlink()
    tiny_model("llama").save_pretrained(directory, max_shard_size="20KB")
    sorted(directory.glob("*.safetensors"))[0].unlink()


BROKEN = {
    "truncated weights": (
        lambda d: truncate(d / "model.safetensors", 0.5),
        "model.safetensors: truncated",
        "copy it again",
    ),
    "empty weights": (lambda d: truncate(d / "model.safetensors", 0), "model.safetensors: truncated", "copy it again"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights", "model.safetensors is needed"),
    "a shard lost": (lose_a_shard, "-of-0", "copy the checkpoint again"),
    "pickled weights": (to_pickle, "pytorch_model.bin", "convert them to safetensors"),
    "shape": (
        lambda d: edit_config(d, intermediate_size=40),
        "has shape 32x48, config.json asks for 32x40",
        "another model",
    ),
    "vocabulary": (lambda d: edit_config(d, vocab_size=70), "config.json asks for 70x32", "another model"),
    "weight missing": (
        lambda d: edit_weights(d, lambda w: w.pop("model.layers.0.self_attn.q_proj.weight")),
        "1 weights are missing, first model.layers.0.self_attn.q_proj.weight",
        "copy the checkpoint again",
    ),
    "head missing": (lambda d: edit_weights(d, lambda w: w.pop("lm_head.weight")), "first lm_head.weight", "copy"),
    "layer too many": (lambda d: edit_config(d, num_hidden_layers=3), "missing, first model.layers.2", "copy"),
    "layer too few": (lambda d: edit_config(d, num_hidden_layers=1), "no place in the model", "another model"),
    "nan": (lambda d: edit_weights(d, put_nan), "model.layers.1.mlp.up_proj.weight holds NaN", "earlier checkpoint"),
    "broken config": (lambda d: truncate(d / "config.json", 0.5), "broken JSON", "repair the file"),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object", "config.json"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json", "name the directory"),
    "unknown type": (lambda d: edit_config(d, model_type="nonsense"), "model_type='nonsense'", "newer transformers"),
    "no type": (lambda d: edit_config(d, remove=["model_type"]), "model_type=None", "newer transformers"),
    "remote code": (
        lambda d: edit_config(d, model_type="x", auto_map={"AutoModelForCausalLM": "x.X"}),
        "needs code that comes with the checkpoint",
        "trust_remote_code",
    ),
    "config value": (lambda d: edit_config(d, hidden_size="wide"), "config.json", ""),
    "heads": (lambda d: edit_config(d, num_attention_heads=0), "config.json", ""),
    "broken tokenizer": (
        lambda d: truncate(d / "tokenizer.json", 0.5),
        "its tokenizer cannot be read",
        "copy it again",
    ),
    "section unknown key": (
        lambda d: edit_config(d, block_diffusion={"mask_token_id": 5, "blok_size": 8}),
        "config.json: block_diffusion: unknown key 'blok_size'",
        "'block_size'",
    ),
    "section value": (
        lambda d: edit_config(d, block_diffusion={"mask_token_id": 5, "block_size": 0}),
        "config.json: block_diffusion: block_size=0",
        "1 or more",
    ),
    "section without mask": (
        lambda d: edit_config(d, block_diffusion={"block_size": 8}),
        "config.json: block_diffusion: mask_token_id is missing",
        "add",
    ),
    "section no object": (lambda d: edit_config(d, block_diffusion=8), "config.json: block_diffusion", "object"),
    "mask outside": (
        lambda d: edit_config(d, block_diffusion={"mask_token_id": 64}),
        "mask_token_id=64 is outside the vocabulary",
        "below 64",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directory_is_refused(model, case):
    break_it, *said = BROKEN[case]
    break_it(model)
    message = refusal(model)
    assert str(model) in message
    for part in said:
        assert part in message


OPTIONS = {
    "mask outside": ({"mask_token_id": 64}, "mask_token_id=64 is outside the vocabulary"),
    "mask negative": ({"mask_token_id": -1}, "mask_token_id=-1"),
    "no mask": ({"block_size": 8}, "give mask_token_id"),
    "block size": ({"mask_token_id": 5, "block_size": 0}, "block_size=0"),
    "attention": ({"mask_token_id": 5, "context_attention": "sideways"}, "context_attention='sideways'"),
    "dtype": ({"dtype": "float8"}, "dtype='float8': must be one of float32"),
    "base": ({"base": "elsewhere"}, "not a LoRA adapter"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_settings_that_do_not_fit_are_refused(whole, case):
    options, said = OPTIONS[case]
    assert said in refusal(whole, **options)


def test_what_is_not_there_is_refused(tmp_path):
    for source in ("nowhere", "./nowhere", "/nowhere/at/all", "nowhere.gguf", tmp_path / "nowhere" / "x"):
        message = refusal(source)
        assert "no such file or directory" in message
        assert "hub id" in message


def test_unreachable_hub_is_refused(monkeypatch):
    def offline(*_, **__):
        raise LocalEntryNotFoundError("Cannot find it in the cache, and the network is down.\nTry again.")

    monkeypatch.setattr("fast_dllm.checkpoint.load.snapshot_download", offline)
    message = refusal("owner/model")
    assert "no such directory here" in message
    assert "network is down" in message


def test_hub_id_is_downloaded_without_pickles(whole, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(whole)

    monkeypatch.setattr("fast_dllm.checkpoint.load.snapshot_download", download)
    loaded = load_checkpoint("owner/model")
    assert loaded.source == asked["name"] == "owner/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_code_in_the_checkpoint_runs_only_when_asked(model, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(model, model_type="own", auto_map=auto_map)
    (model / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert "trust_remote_code" in refusal(model)
    assert type(load_checkpoint(model, trust_remote_code=True).model).__name__ == "OwnForCausalLM"


@pytest.mark.parametrize("name", ["model.gguf", "notes.txt"])
def test_a_file_that_is_no_gguf_is_refused(tmp_path, name):
    (tmp_path / name).write_text("hello")
    assert "GGUF" in refusal(tmp_path / name)


def test_a_local_directory_wins_over_a_name(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert load_checkpoint("smollm2").model.config.vocab_size == 64


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)),
        lambda: T5ForConditionalGeneration(T5Config(d_model=8, num_layers=1, num_heads=1, vocab_size=9)),
    ],
    ids=["encoder", "encoder-decoder"],
)
def test_models_that_are_not_decoders_are_refused(tmp_path, make):
    make().save_pretrained(tmp_path)
    assert "is not a decoder-only language model" in refusal(tmp_path)


@pytest.fixture
def adapter(whole, tmp_path):
    plain = get_peft_model(load_checkpoint(whole).model, LoraConfig(target_modules=["q_proj"]))
    plain.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(whole))
    return tmp_path / "adapter"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_an_adapter_weight(directory):
    weights = load_file(directory / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})


BROKEN_ADAPTERS = {
    "truncated": (lambda d: truncate(d / "adapter_model.safetensors", 0.5), "adapter_model.safetensors: truncated"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
    "pickled": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        "pickled weights are not read",
    ),
    "weight missing": (drop_an_adapter_weight, "does not fit its adapter_config.json"),
    "rank": (lambda d: edit(d / "adapter_config.json", r=2), "peft cannot load the adapter"),
    "kind": (lambda d: edit(d / "adapter_config.json", peft_type="PREFIX_TUNING"), "only LoRA adapters"),
    "no base": (
        lambda d: edit(d / "adapter_config.json", base_model_name_or_path=None),
        "name the base model with base",
    ),
    "base lost": (
        lambda d: edit(d / "adapter_config.json", base_model_name_or_path="/nowhere"),
        "its base does not load: /nowhere",
    ),
    "modules": (lambda d: edit(d / "adapter_config.json", target_modules=["nothing"]), "peft cannot load the adapter"),
    "broken record": (lambda d: (d / "block_diffusion.json").write_text("{"), "block_diffusion.json:1: broken JSON"),
    "empty record": (lambda d: (d / "block_diffusion.json").write_text("{}"), "block_diffusion.json: block_diffusion"),
    "mask outside": (
        lambda d: (d / "block_diffusion.json").write_text('{"block_diffusion": {"mask_token_id": 64}}'),
        "mask_token_id=64 is outside",
    ),
    "another base": (
        lambda d: (d / "block_diffusion.json").write_text('{"base_fingerprint": "abc"}'),
        "trained on another base",
    ),
}


@pytest.mark.parametrize("case", BROKEN_ADAPTERS)
def test_broken_adapter_is_refused(adapter, case):
    break_it, said = BROKEN_ADAPTERS[case]
    break_it(adapter)
    message = refusal(adapter)
    assert str(adapter) in message
    assert said in message
