"""Every kind of bad input: exit code 2, one line on stderr that names thing and remedy, nothing written."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from fast_dllm.checkpoint import load_checkpoint, save_adapter


class Bench:
    """Makes the bad things, each in a directory of its own."""

    def __init__(self, tmp_path, plain, adapted):
        self.tmp, self.plain, self.adapted = tmp_path, plain, adapted
        self.new = tmp_path / "new"
        self.chats = self.file("chats.jsonl", [{"messages": [user("hello"), assistant("bye")]}])

    def file(self, name, content):
        """A file of bytes, of text, or of JSON lines."""
        path = self.tmp / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def model(self, change=None, *, of=None, **config):
        """A copy of a model, with changes to its config and its files."""
        directory = shutil.copytree(of or self.plain, self.tmp / "model")
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if change is not None:
            change(directory)
        return directory

    def generate(self, model=None, *argv):
        return ["generate", model or self.adapted, "--prompt", "hello", "--out", self.new, *argv]

    def prompts(self, content, name="prompts.jsonl"):
        return ["generate", self.adapted, "--prompt-file", self.file(name, content), "--out", self.new]

    def adapt(self, *argv, data=None):
        data = self.chats if data is None else data
        return ["adapt", "--model", self.plain, "--data", data, "--out", self.new, *argv]

    def distill(self, content, *argv, name="prompts.jsonl"):
        return ["distill", self.plain, "--prompts", self.file(name, content), "--out", self.new, *argv]

    def rows(self, content):
        return self.adapt(data=self.file("bad.jsonl", content))

    def recipe(self, content, name="recipe.json"):
        return self.adapt("--recipe", self.file(name, content))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(*messages):
    return [{"messages": list(messages)}]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def put_nan(directory):
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def to_pickle(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def encoder(bench):
    model = BertForMaskedLM(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9))
    model.save_pretrained(bench.tmp / "bert")
    return bench.tmp / "bert"


def foreign_adapter(bench):
    checkpoint = load_checkpoint(bench.plain)
    model = get_peft_model(checkpoint.model, LoraConfig(target_modules=["q_proj"]))
    checkpoint.fingerprint = "0" * 32
    save_adapter(model, bench.tmp / "adapter", checkpoint=checkpoint)
    return bench.tmp / "adapter"


def truncated_gguf(bench):
    path = bench.tmp / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([str(n) for n in range(100)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    truncate(path)
    return path


def without_tokenizer(directory):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)


def without_template(directory):
    (directory / "chat_template.jinja").unlink()


def directory_with_notes(bench):
    (bench.tmp / "notes").mkdir()
    (bench.tmp / "notes" / "notes.txt").write_text("mine")
    return bench.tmp / "notes"


def earlier_run(bench):
    save = bench.tmp / "new.run" / "checkpoint-1"
    save.mkdir(parents=True)
    (save / "trainer_state.json").write_text("{}")
    (save.parent / "options.json").write_text("{}")
    return bench.adapt()


SECTION = {"mask_token_id": 54, "block_size": 8}

# Name: (makes the command line, what the line must say).
MODELS = {
    "missing model": (lambda b: b.generate("nowhere"), "nowhere: no such file or directory"),
    "empty directory": (lambda b: b.generate(b.tmp), "no config.json"),
    "a text file as model": (lambda b: b.generate(b.chats), "neither a directory nor a GGUF file"),
    "truncated weights": (lambda b: b.generate(b.model(lambda d: truncate(d / "model.safetensors"))), "truncated"),
    "weights with NaN": (lambda b: b.generate(b.model(put_nan)), "model.norm.weight holds NaN"),
    "pickled weights": (lambda b: b.generate(b.model(to_pickle)), "pickled weights are not read"),
    "no weights": (lambda b: b.generate(b.model(lambda d: (d / "model.safetensors").unlink())), "no weights"),
    "broken config": (lambda b: b.generate(b.model(lambda d: truncate(d / "config.json"))), "broken JSON"),
    "config of another model": (lambda b: b.generate(b.model(hidden_size=64)), "config.json asks for"),
    "encoder": (lambda b: b.generate(encoder(b)), "not a decoder-only language model"),
    "unknown architecture": (lambda b: b.generate(b.model(model_type="nonsense")), "model_type='nonsense'"),
    "remote code": (lambda b: b.generate(b.model(model_type="x", auto_map={"AutoConfig": "x.X"})), "needs code"),
    "unknown key": (
        lambda b: b.generate(b.model(block_diffusion={**SECTION, "blok_size": 8})),
        "unknown key 'blok_size'; the nearest known one is 'block_size'",
    ),
    "mask outside the vocabulary": (
        lambda b: b.generate(b.model(block_diffusion={**SECTION, "mask_token_id": 64})),
        "mask_token_id=64 is outside the vocabulary",
    ),
    "mask option outside": (lambda b: b.generate(b.plain, "--mask-token-id", 64), "is outside the vocabulary"),
    "mask option negative": (lambda b: b.generate(b.plain, "--mask-token-id", -1), "mask_token_id=-1"),
    "no mask token": (lambda b: b.generate(b.plain, "--block-size", 8), "this model has no mask token; adapt it"),
    "adapter for another base": (lambda b: b.generate(foreign_adapter(b)), "trained on another base"),
    "base of no adapter": (lambda b: b.generate(b.adapted, "--base", b.plain), "not a LoRA adapter"),
    "trained over the base of no adapter": (lambda b: b.adapt("--base", b.plain), "not a LoRA adapter"),
    "truncated gguf": (lambda b: b.generate(truncated_gguf(b)), "truncated or damaged GGUF"),
    "no gguf": (lambda b: b.generate(b.file("model.gguf", "hello")), "not a GGUF file"),
    "broken tokenizer": (
        lambda b: b.generate(b.model(lambda d: truncate(d / "tokenizer.json"))),
        "its tokenizer cannot be read",
    ),
    "no tokenizer": (lambda b: b.generate(b.model(without_tokenizer)), "has no tokenizer"),
    "chat without a tokenizer": (lambda b: ["chat", b.model(without_tokenizer)], "has no tokenizer"),
    "no chat template": (lambda b: b.generate(b.model(without_template)), "no chat template"),
    "unknown dtype": (lambda b: b.generate(None, "--dtype", "float8"), "dtype='float8'"),
    "info on a file": (lambda b: ["info", b.chats], "neither a directory nor a GGUF file"),
    "chat with a missing model": (lambda b: ["chat", "nowhere"], "no such file or directory"),
    "export of an unadapted model": (lambda b: ["export", b.plain, "--to", b.new], "adapt it first"),
    "export into another thing": (
        lambda b: ["export", b.adapted, "--to", directory_with_notes(b)],
        "not a fast-dllm checkpoint",
    ),
    "adapt a missing model": (lambda b: b.adapt("--model", "nowhere"), "nowhere: no such file or directory"),
    "adapt weights with NaN": (lambda b: b.adapt("--model", b.model(put_nan)), "holds NaN"),
    "adapt without a tokenizer": (lambda b: b.adapt("--model", b.model(without_tokenizer)), "has no tokenizer"),
    "adapt without a template": (lambda b: b.adapt("--model", b.model(without_template)), "no chat template"),
}
PROMPTS = {
    "no prompt": (lambda b: ["generate", b.adapted], "no prompt; give one of --prompt"),
    "two prompt sources": (lambda b: b.generate(None, "--prompt-file", b.chats), "exclude each other"),
    "empty prompt": (lambda b: b.generate(None, "--prompt", " \n"), "--prompt is empty"),
    "prompt in no encoding": (lambda b: b.generate(None, "--prompt", "\udcff"), "half a surrogate pair"),
    "empty standard input": (lambda b: ["generate", b.adapted, "--prompt", "-"], "--prompt is empty"),
    "no standard input": (lambda b: ["generate", b.adapted, "--prompt-file", "-"], "standard input: has no prompts"),
    "missing prompt file": (lambda b: ["generate", b.adapted, "--prompt-file", b.tmp / "no"], "no such file"),
    "directory as prompt file": (lambda b: ["generate", b.adapted, "--prompt-file", b.tmp], "is a directory"),
    "empty prompt file": (lambda b: b.prompts("\n\n"), "prompts.jsonl: has no prompts"),
    "broken prompt line": (lambda b: b.prompts('{"prompt": "a"}\n{"prompt": '), "prompts.jsonl:2: not JSON"),
    "prompt without content": (lambda b: b.prompts([{"text": "a"}]), "prompts.jsonl:1: no prompt (keys: text)"),
    "blank prompt row": (lambda b: b.prompts([{"prompt": "a"}, {"prompt": ""}]), "prompts.jsonl:2: prompt is empty"),
    "prompt row a list": (lambda b: b.prompts("[1]"), "a JSON list, not an object"),
    "prompt row a number": (lambda b: b.prompts([{"prompt": 5}]), "prompt is int, not a string"),
    "prompt and messages": (lambda b: b.prompts([{"prompt": "a", "messages": []}]), "both prompt and messages"),
    "empty messages": (lambda b: b.prompts([{"messages": []}]), "messages is empty"),
    "the assistant speaks last": (lambda b: b.prompts(chat(user("a"), assistant("b"))), "end with a user message"),
    "half a surrogate": (lambda b: b.prompts('{"prompt": "a\\ud800"}'), "prompts.jsonl:1: message 1: content has half"),
    "prompts not UTF-8": (lambda b: b.prompts(b"caf\xe9\n", "prompts.txt"), "prompts.txt:1: not UTF-8"),
    "prompt too long": (lambda b: b.generate(None, "--prompt", "a" * 500), "exceed the model's 512 positions"),
    "one of the prompts too long": (lambda b: b.prompts("a\n" + "b" * 500, "prompts.txt"), "prompt 2: prompt of"),
    "answer too long": (lambda b: b.generate(None, "--max-new-tokens", 512), "lower max_new_tokens"),
}
OPTIONS = {
    "no new tokens": (lambda b: b.generate(None, "--max-new-tokens", 0), "max_new_tokens=0"),
    "fewer than no new tokens": (lambda b: b.generate(None, "--max-new-tokens", -1), "max_new_tokens=-1"),
    "new tokens no number": (lambda b: b.generate(None, "--max-new-tokens", "abc"), "'--max-new-tokens'"),
    "threshold above one": (
        lambda b: b.generate(None, "--threshold", 1.5),
        "threshold=1.5: must be a number from 0 to 1",
    ),
    "threshold not a number": (lambda b: b.generate(None, "--threshold", "nan"), "threshold=nan"),
    "negative factor": (lambda b: b.generate(None, "--factor", -1), "factor=-1"),
    "no block": (lambda b: b.generate(None, "--block-size", 0), "block_size=0"),
    "small block does not divide": (
        lambda b: b.generate(None, "--small-block-size", 3),
        "does not divide block_size=8",
    ),
    "small block above the block": (lambda b: b.generate(None, "--small-block-size", 16), "choose a divisor of 8"),
    "negative temperature": (lambda b: b.generate(None, "--temperature", -0.5), "temperature=-0.5"),
    "no top-p": (lambda b: b.generate(None, "--top-p", 0), "top_p=0.0: must be at least 0.0001"),
    "top-p above one": (lambda b: b.generate(None, "--top-p", 1.1), "top_p=1.1"),
    "negative top-k": (lambda b: b.generate(None, "--top-k", -1), "top_k=-1"),
    "negative seed": (lambda b: b.generate(None, "--seed", -1), "seed=-1"),
    "unknown policy": (lambda b: b.generate(None, "--policy", "best"), "'threshold', 'factor', 'fixed', 'sequential'"),
    "unknown cache": (lambda b: b.generate(None, "--sub-block-cache", "all"), "'none', 'dual', 'prefix'"),
    "unknown mode": (lambda b: b.generate(None, "--mode", "fast"), "'diffusion', 'ar'"),
    "no tokens a step": (lambda b: b.generate(None, "--tokens-per-step", 0), "tokens_per_step=0"),
    "empty stop string": (lambda b: b.generate(None, "--stop", ""), "non-empty strings"),
    "no batch": (lambda b: b.generate(None, "--batch-size", 0), "'--batch-size'"),
    "blocks in mode ar": (lambda b: b.generate(None, "--mode", "ar", "--block-size", 8), "one token at a time"),
    "out is a directory": (lambda b: b.generate(None, "--out", b.tmp), "cannot be written"),
    "out in no directory": (lambda b: b.generate(None, "--out", b.tmp / "no" / "x"), "cannot be written"),
    "out below a file": (lambda b: b.generate(None, "--out", b.chats / "x"), "cannot be written"),
    "unknown command": (lambda b: ["generat", b.adapted], "No such command 'generat'"),
    "unknown option": (lambda b: b.generate(None, "--treshold", 0.5), "No such option: --treshold"),
    "option without a value": (lambda b: ["generate", b.adapted, "--prompt"], "--prompt"),
    "no model": (lambda b: ["generate", "--prompt", "a"], "Missing argument 'MODEL'"),
    "an argument too many": (lambda b: ["info", b.adapted, b.plain], "unexpected extra argument"),
    "demo in no time": (lambda b: ["demo", "--minutes", -1], "'--minutes'"),
}
ADAPT = {
    "broken line": (lambda b: b.rows('{"messages": [}\n'), "bad.jsonl:1: not JSON"),
    "wrong role": (lambda b: b.rows(chat({"role": "robot", "content": "a"})), "bad.jsonl:1: message 1: role 'robot'"),
    "no messages": (lambda b: b.rows(chat()), "bad.jsonl:1: messages is empty"),
    "no assistant turn": (lambda b: b.rows(chat(user("a"))), "bad.jsonl:1: no assistant turn"),
    "content missing": (lambda b: b.rows(chat({"role": "user"})), 'message 1 has no "content"'),
    "content a number": (lambda b: b.rows(chat(user(5), assistant("b"))), "content is int, not a string"),
    "data not UTF-8": (lambda b: b.rows(b'{"a": "\xff"}\n'), "bad.jsonl:1: not UTF-8"),
    "empty data": (lambda b: b.rows(""), "bad.jsonl: has no rows"),
    "missing data": (lambda b: b.adapt(data=b.tmp / "no.jsonl"), "no.jsonl: no such file"),
    "directory as data": (lambda b: b.adapt(data=b.tmp), "is a directory"),
    "answers all cut off": (
        lambda b: b.adapt("--max-length", 8, "--block-size", 8),
        "begins behind max_length=8 tokens; raise --max-length",
    ),
    "parquet that is none": (lambda b: b.adapt(data=b.file("x.parquet", "hello")), "datasets cannot load it"),
    "weight no number": (lambda b: b.adapt(data=f"{b.chats}:-1"), "weight=-1.0: must be a number above 0"),
    "recipe data a number": (
        lambda b: ["adapt", "--recipe", b.file("r.json", '{"data": 5}'), "--model", b.plain, "--out", b.new],
        "data=5: must name a file",
    ),
    "no data": (lambda b: ["adapt", "--model", b.plain, "--out", b.new], "no data; give --data"),
    "unknown task": (
        lambda b: ["adapt", "--model", b.plain, "--task", "chain_summ", "--out", b.new],
        "task 'chain_summ': unknown; choose from chain_sum",
    ),
    "no model": (lambda b: ["adapt", "--data", b.chats, "--out", b.new], "no model; give --model"),
    "no out": (lambda b: ["adapt", "--model", b.plain, "--data", b.chats], "Missing option '--out'"),
    "recipe not JSON": (lambda b: b.recipe("steps: 5"), "recipe.json: not JSON"),
    "recipe not TOML": (lambda b: b.recipe("steps: 5", "recipe.toml"), "recipe.toml: not TOML"),
    "recipe missing": (lambda b: b.adapt("--recipe", b.tmp / "no.json"), "no.json: cannot be read"),
    "recipe a list": (lambda b: b.recipe("[]"), "a recipe is an object"),
    "recipe unknown key": (lambda b: b.recipe('{"learning_rat": 1}'), "the nearest known one is 'learning_rate'"),
    "recipe of wrong kind": (lambda b: b.recipe('{"pack": "no"}'), "pack='no': must be true or false"),
    "recipe steps a string": (lambda b: b.recipe('{"steps": "many"}'), "steps='many'"),
    "recipe tasks a number": (lambda b: b.recipe('{"tasks": 5}'), "tasks=5: must be a list"),
    "no steps": (lambda b: b.adapt("--steps", 0), "steps=0"),
    "learning rate": (lambda b: b.adapt("--learning-rate", -1), "learning_rate=-1"),
    "length not in blocks": (lambda b: b.adapt("--max-length", 100), "must be a multiple of block_size=32"),
    "ar weight with block attention": (lambda b: b.adapt("--ar-weight", 0.5), "needs context_attention='causal'"),
    "full attention": (lambda b: b.adapt("--context-attention", "full"), "is not one of 'block', 'causal'"),
    "mask token unknown": (lambda b: b.adapt("--mask-token", "<nothing>"), "mask token '<nothing>'"),
    "out is another thing": (lambda b: b.adapt("--out", directory_with_notes(b)), "not a fast-dllm checkpoint"),
    "out is a file": (lambda b: b.adapt("--out", b.chats), "is a file"),
    "out below a file": (lambda b: b.adapt("--out", b.chats / "x"), "is not a writable directory"),
    "out has another run": (earlier_run, "holds a run with other settings"),
}
DATA = {
    "no model": (lambda b: ["data", b.chats], "Missing option '--model'"),
    "missing model": (lambda b: ["data", b.chats, "--model", "nowhere"], "nowhere: no such file or directory"),
    "no tokenizer": (lambda b: ["data", b.chats, "--model", b.model(without_tokenizer)], "has no tokenizer"),
    "no template": (lambda b: ["data", b.chats, "--model", b.model(without_template)], "chats.jsonl:1: "),
    "missing file": (lambda b: ["data", b.tmp / "no.jsonl", "--model", b.plain], "no.jsonl: no such file"),
    "no weight": (lambda b: ["data", f"{b.chats}:0", "--model", b.plain], "weight=0.0: must be a number above 0"),
    "broken JSON": (lambda b: ["data", "[1", "--model", b.plain], "not JSON"),
    "unknown key": (lambda b: ["data", '{"sorce": "a"}', "--model", b.plain], "unknown key 'sorce'"),
    "only bad rows": (
        lambda b: ["data", b.file("bad.jsonl", "{"), "--model", b.plain, "--skip-bad-rows"],
        "bad.jsonl: has no rows",
    ),
    "distill nothing": (lambda b: b.distill("\n"), "prompts.jsonl: has no prompts"),
    "distill a text": (lambda b: b.distill([{"text": "a"}]), "prompts.jsonl:1: no prompt (keys: text)"),
    "distill with no tokens": (lambda b: b.distill("a", "--max-new-tokens", 0, name="p.txt"), "max_new_tokens=0"),
    "distill onto a file": (lambda b: b.distill("a", "--out", b.chats, name="p.txt"), "chats.jsonl: is there already"),
    "distill into no directory": (
        lambda b: b.distill("a", "--out", b.tmp / "no" / "x", name="p.txt"),
        "cannot be writ",
    ),
    "distill a missing model": (lambda b: ["distill", "no", "--prompts", b.chats, "--out", b.new], "no: no such file"),
}
CASES = {
    f"{group} - {name}": case
    for group, cases in {"model": MODELS, "prompt": PROMPTS, "option": OPTIONS, "adapt": ADAPT, "data": DATA}.items()
    for name, case in cases.items()
}


def snapshot(directory: Path) -> dict[str, int]:
    return {str(path): path.stat().st_size for path in directory.rglob("*")}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(run, tmp_path, plain, adapted, case):
    make, said = CASES[case]
    argv = make(Bench(tmp_path, plain, adapted))
    before = snapshot(tmp_path)
    outcome = run(*argv, stdin=b"hello\n" if argv[0] == "chat" else b"")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert outcome.err.startswith("error: ")
    assert said in outcome.err
    assert outcome.out == "" or argv[0] == "adapt"  # which tells the samples it found
    assert snapshot(tmp_path) == before
