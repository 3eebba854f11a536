import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fast_dllm.checkpoint import add_mask_token, load_checkpoint, save_checkpoint
from fast_dllm.cli import main
from tiny import tiny_model, tiny_tokenizer


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def rows(self):
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def run(capfd, monkeypatch) -> Callable[..., Outcome]:
    """Runs a command line in this process; what it writes to the file descriptors is captured."""

    def command(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfd.readouterr()
        code = main([str(argument) for argument in argv])
        written = capfd.readouterr()
        return Outcome(code, written.out, written.err)

    return command


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> Path:
    """An autoregressive model, as it comes from the hub."""
    directory = tmp_path_factory.mktemp("models") / "plain"
    tiny_model("smollm2").save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def adapted(plain) -> Path:
    """A block-diffusion checkpoint: blocks of 8, mask token 54, 512 positions."""
    checkpoint = load_checkpoint(plain)
    add_mask_token(checkpoint)
    checkpoint.config = replace(checkpoint.config, block_size=8, context_attention="block")
    save_checkpoint(checkpoint, plain.parent / "adapted")
    return plain.parent / "adapted"


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"add {n} and 1"}, {"role": "assistant", "content": f"it is {n + 1}."}]
        for n in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path
