"""What is exported runs in plain transformers, where fast_dllm is not, and says the same."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.checkpoint import AUTOREGRESSIVE, Checkpoint, add_mask_token, load_checkpoint, save_checkpoint
from fast_dllm.errors import FastDLLMError
from fast_dllm.export import export_checkpoint
from fast_dllm.export.assets.modeling import BlockDiffusionForCausalLM
from fast_dllm.export.sources import MODELING_FILE, exported_sources, modules_needed
from tiny import ARCHITECTURES, tiny_model, tiny_tokenizer

PROMPTS = [[2, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [3, 4, 5, 6, 7, 8, 9, 10, 20, 21, 22]]
SETTINGS = {"max_new_tokens": 21, "small_block_size": 4, "threshold": 0.05}

# A process that sees torch and transformers, and no fast_dllm: neither the installed one nor the source tree.
OUTSIDE = """
import json, sys

class NoFastDLLM:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fast_dllm":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoFastDLLM())
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()
job = json.loads(sys.stdin.read())
settings, inputs = job["settings"], {"input_ids": torch.tensor(job["prompts"])}

def untrusted(directory):
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        logits = model(inputs["input_ids"]).logits
    return {"type": config.model_type, "class": type(model).__name__, "logits": logits.tolist()}

def trusted(directory, name):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    greedy = model.generate(inputs["input_ids"], tokenizer=tokenizer, **settings)
    sampled = model.generate(inputs["input_ids"], temperature=1.0, seed=5, use_block_cache=True, **settings)
    model.save_pretrained(f"again/{name}")
    again = AutoModelForCausalLM.from_pretrained(f"again/{name}", trust_remote_code=True)
    return {
        "class": type(model).__name__,
        "parent": type(model).__mro__[1].__name__,
        "greedy": greedy.tolist(),
        "sampled": sampled.tolist(),
        "saved_again": again.generate(inputs["input_ids"], **settings).tolist(),
    }

directories = job["directories"].items()
result = {"untrusted": {name: untrusted(directory) for name, directory in directories}}
result["trusted"] = {name: trusted(directory, name) for name, directory in directories}
AutoModelForCausalLM.from_pretrained(job["witness"], trust_remote_code=True)
print(json.dumps(result))
"""


def adapted(architecture="llama", *, block_size=8, **overrides):
    checkpoint = Checkpoint(
        model=tiny_model(architecture, **overrides),
        tokenizer=tiny_tokenizer(),
        config=AUTOREGRESSIVE,
        stop_token_ids=(3, 1),
        origin="a test",
    )
    add_mask_token(checkpoint)
    checkpoint.config = replace(checkpoint.config, block_size=block_size, context_attention="block")
    return checkpoint


def in_process(tmp_path, **overrides):
    """A checkpoint, and the class of its export (Llama's) loaded here."""
    checkpoint = adapted("llama", **overrides)
    export_checkpoint(checkpoint, tmp_path / "out")
    return checkpoint, BlockDiffusionForCausalLM.from_pretrained(tmp_path / "out")


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Per architecture a checkpoint and its export, all in folders of one name."""
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for architecture in ARCHITECTURES:
        checkpoint = adapted(architecture, block_size=16 if architecture == "qwen3" else 8)
        export_checkpoint(checkpoint, root / architecture / "model")
        made[architecture] = (checkpoint, root / architecture / "model")
    return made


@pytest.fixture(scope="module")
def outside(exports, tmp_path_factory):
    """What a process without fast_dllm gets from the exports, and what it says on stderr."""
    home = tmp_path_factory.mktemp("outside")
    job = {
        "directories": {name: str(directory) for name, (_, directory) in exports.items()},
        "prompts": PROMPTS,
        "settings": SETTINGS,
        "witness": str(with_witness(home)),
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (home / "it_ran").exists()
    return {**json.loads(done.stdout), "stderr": done.stderr}


def with_witness(root):
    """An export whose code, when it runs, leaves the file "it_ran" in `root`."""
    export_checkpoint(adapted(), root / "model")
    modeling = root / "model" / MODELING_FILE
    modeling.write_text(f"open({str(root / 'it_ran')!r}, 'w').close()\n" + modeling.read_text())
    return root / "model"


def test_model_card_call_gives_the_same_ids_without_fast_dllm(exports, outside):
    for architecture, (checkpoint, _) in exports.items():
        model, found = BlockDiffusionLM(checkpoint), outside["trusted"][architecture]
        prompts = torch.tensor(PROMPTS)
        assert found["class"] == "BlockDiffusionForCausalLM"
        assert found["parent"] == type(checkpoint.model).__name__
        assert found["greedy"] == model.generate(prompts, **SETTINGS).tolist()
        sampled = model.generate(prompts, temperature=1.0, seed=5, use_block_cache=True, **SETTINGS)
        assert found["sampled"] == sampled.tolist()


def test_saving_an_export_takes_its_code_along(outside):
    for found in outside["trusted"].values():
        assert found["saved_again"] == found["greedy"]


def test_without_trust_it_is_the_autoregressive_model(exports, outside):
    for architecture, (checkpoint, _) in exports.items():
        found = outside["untrusted"][architecture]
        assert found["type"] == checkpoint.model.config.model_type
        assert found["class"] == type(checkpoint.model).__name__
        with torch.inference_mode():
            expected = checkpoint.model(torch.tensor(PROMPTS)).logits
        torch.testing.assert_close(torch.tensor(found["logits"]), expected)


def test_loading_and_decoding_say_nothing(outside):
    assert outside["stderr"] == ""


def test_code_of_a_checkpoint_runs_only_when_trusted(outside, tmp_path):
    directory = with_witness(tmp_path)  # the one that `outside` ran, which did leave its file
    load_checkpoint(directory)
    AutoModelForCausalLM.from_pretrained(directory)
    assert not (tmp_path / "it_ran").exists()


def test_load_checkpoint_reads_an_export_without_its_code(exports):
    for checkpoint, directory in exports.values():
        loaded = load_checkpoint(directory)
        assert type(loaded.model) is type(checkpoint.model)
        assert loaded.config == checkpoint.config
        assert loaded.stop_token_ids == (3, 1)
        assert loaded.tokenizer.mask_token_id == checkpoint.config.mask_token_id
        expected = BlockDiffusionLM(checkpoint).generate(PROMPTS, **SETTINGS)
        assert BlockDiffusionLM(loaded).generate(PROMPTS, **SETTINGS) == expected


def test_an_export_loaded_and_exported_again_is_the_same(exports, tmp_path):
    _, directory = exports["qwen2"]
    export_checkpoint(load_checkpoint(directory), tmp_path / "model")
    again = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert again.keys() == {path.name for path in directory.iterdir()}
    for name in again.keys() - {"README.md", "tokenizer.json", "tokenizer_config.json"}:
        assert again[name] == (directory / name).read_bytes(), name


def test_exported_sources_import_nothing_of_fast_dllm(exports):
    for _, directory in exports.values():
        files = {path.stem for path in directory.glob("*.py")}
        for path in directory.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not any(alias.name.startswith("fast_dllm") for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert not node.module.startswith("fast_dllm")
                elif isinstance(node, ast.ImportFrom):
                    assert node.module in files


def test_every_exported_module_is_decoding():
    needed = set(modules_needed())
    assert {"fast_dllm.engine.engine", "fast_dllm.decoding.state", "fast_dllm.model.hf"} <= needed
    assert not any(module.startswith(("fast_dllm.checkpoint", "fast_dllm.text")) for module in needed)


def test_a_module_that_is_not_decoding_is_not_exported(monkeypatch):
    monkeypatch.setattr("fast_dllm.export.sources._ALLOWED", ("config", "errors", "masks", "cache", "model"))
    with pytest.raises(RuntimeError, match=r"imports fast_dllm\.generation"):
        exported_sources("LlamaForCausalLM", None)


def test_every_file_tells_where_it_is_from():
    for text in exported_sources("LlamaForCausalLM", 512).values():
        assert "of fast-dllm 0." in text.splitlines()[0]


def test_card_shows_the_call_and_stays_true_to_the_checkpoint(exports):
    text = (exports["qwen3"][1] / "README.md").read_text()
    assert 'inputs["input_ids"], tokenizer=tokenizer, max_new_tokens=512' in text
    assert "trades speed for care" in text  # of a model that cannot verify
    assert "blocks of 16 tokens" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert "apply_chat_template" in code
    ast.parse(code)


def test_an_autoregressive_model_is_refused_and_leaves_nothing(tmp_path):
    checkpoint = adapted()
    checkpoint.config = AUTOREGRESSIVE
    with pytest.raises(FastDLLMError, match="adapt it first"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_code_of_its_own_is_refused_and_leaves_nothing(tmp_path):
    class OwnForCausalLM(torch.nn.Module):
        config = tiny_model("llama").config

    checkpoint = replace(adapted(), model=OwnForCausalLM())
    checkpoint.model.config = tiny_model("llama").config
    with pytest.raises(FastDLLMError, match="OwnForCausalLM is not a causal language model of transformers"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = adapted()
    monkeypatch.setattr("fast_dllm.export.export.export_card", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(FastDLLMError, match="full"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FastDLLMError, match="not a fast-dllm checkpoint"):
        export_checkpoint(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_earlier_checkpoint_is_replaced(tmp_path):
    save_checkpoint(adapted("qwen3"), tmp_path / "out")
    export_checkpoint(adapted("llama"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_forward_is_the_checkpoints_own_attention(tmp_path):
    checkpoint, model = in_process(tmp_path)
    ids = torch.tensor(PROMPTS)
    expected = BlockDiffusionLM(checkpoint)(ids).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, expected)
        torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, expected)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
        autoregressive = LlamaForCausalLM.forward(model, ids).logits
    torch.testing.assert_close(embedded.logits, expected)
    assert embedded.past_key_values is None
    assert not torch.allclose(autoregressive, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_does_not_see_padding(tmp_path, side):
    _, model = in_process(tmp_path)
    ids = torch.tensor(PROMPTS[:1])
    padding = torch.full((1, 3), 1)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], dim=1)
    real = slice(3, None) if side == "left" else slice(0, ids.shape[1])
    mask = torch.zeros_like(padded)
    mask[:, real] = 1
    with torch.inference_mode():
        logits = model(padded, attention_mask=mask).logits
        torch.testing.assert_close(logits[:, real], model(ids).logits)
    assert logits.isfinite().all()


def test_forward_with_a_cache_or_a_whole_mask_is_the_architectures(tmp_path):
    _, model = in_process(tmp_path)
    ids = torch.tensor(PROMPTS)
    causal = torch.ones(2, 1, 11, 11, dtype=torch.bool).tril()
    with torch.inference_mode():
        expected = LlamaForCausalLM.forward(model, ids).logits
        torch.testing.assert_close(model(ids, attention_mask=causal).logits, expected)
        for name in ("cache", "past_key_values"):
            cache = DynamicCache()
            torch.testing.assert_close(model(ids, **{name: cache}, use_cache=True).logits, expected)
            assert cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_answered_as_if_alone(tmp_path, side):
    _, model = in_process(tmp_path)
    prompts = [PROMPTS[0], PROMPTS[1][:6]]
    gap = [1] * 5
    rows = [prompts[0], gap + prompts[1] if side == "left" else prompts[1] + gap]
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(6, None)] = 0
    ids = model.generate(torch.tensor(rows), attention_mask=mask, **SETTINGS)
    assert ids[:, :11].tolist() == rows
    for row, prompt in zip(ids, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), **SETTINGS)[0, len(prompt) :].tolist()
        assert row[11:].tolist()[: len(alone)] == alone
        assert set(row[11:].tolist()[len(alone) :]) <= {3}


def test_result_carries_statistics_when_asked(tmp_path):
    _, model = in_process(tmp_path)
    result = model.generate(torch.tensor(PROMPTS), return_dict=True, **SETTINGS)
    assert result.total.new_tokens == sum(len(answer) for answer in result.answers)


def test_context_limit_travels_with_the_export():
    assert "MAX_LENGTH: int | None = 16\n" in exported_sources("MistralForCausalLM", 16)[MODELING_FILE]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model, ids: model.generate(ids, tresh=0.9),
            "unknown key 'tresh'; the nearest known one is 'threshold'",
        ),
        (lambda model, ids: model.generate(ids, small_block_size=3), "does not divide block_size=8"),
        (lambda model, ids: model.generate(ids, stop_strings=("a",)), "stop_strings need text"),
        (lambda model, ids: model.generate(ids[0]), r"must be \[batch, length\]"),
        (lambda model, ids: model.generate(ids, attention_mask=ids[:, 1:]), r"must be \[batch, length\]"),
        (lambda model, ids: model.generate(ids + 1000), "not in the vocabulary"),
        (lambda model, ids: model.generate(ids, attention_mask=ids * 0), "empty prompt"),
        (lambda model, ids: model(ids, labels=ids), "sees its own label"),
    ],
)
def test_bad_calls_get_one_line(tmp_path, call, message):
    _, model = in_process(tmp_path)
    with pytest.raises(FastDLLMError, match=message):
        call(model, torch.tensor(PROMPTS))


def test_attention_that_would_misread_the_mask_is_refused(tmp_path):
    export_checkpoint(adapted(), tmp_path / "out")
    model = BlockDiffusionForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with pytest.raises(FastDLLMError, match="blocks need 'sdpa'"):
        model.generate(torch.tensor(PROMPTS))
    with pytest.raises(FastDLLMError, match="blocks need 'sdpa'"):
        model(torch.tensor(PROMPTS))
