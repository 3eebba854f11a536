import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import fast_dllm
from fast_dllm.config import DecodingConfig
from fast_dllm.training.options import AdaptOptions

COMMANDS = [
    "generate",
    "chat",
    "adapt",
    "data",
    "distill",
    "export",
    "info",
    "demo",
    "eval",
    "bench",
    "bench-train",
    "ablate",
]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["", *COMMANDS])
def test_help_says_what_it_does_with_an_example(run, command):
    outcome = run(*command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    text, _, examples = outcome.out.partition("Examples:")
    assert len(text.splitlines()[2].strip()) > 15
    assert " ".join(["fast-dllm", *command]) in examples


def test_no_command_shows_the_help(run):
    assert run().out == run("--help").out


def test_version(run):
    assert run("--version").out == f"fast-dllm {fast_dllm.__version__}\n"


def test_help_does_not_import_torch():
    code = (
        "import sys; from fast_dllm.cli import main\n"
        f"for command in {COMMANDS!r}: main([command, '--help'])\n"
        "heavy = {'torch', 'transformers', 'rich', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else main(['--help']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "config", "skipped"),
    [
        ("generate", DecodingConfig, {"stop_token_ids", "stop_strings"}),
        ("chat", DecodingConfig, {"stop_token_ids", "stop_strings"}),
        ("adapt", AdaptOptions, set()),
    ],
)
def test_every_field_is_an_option_with_help(run, command, config, skipped):
    out = run(command, "--help").out
    for field in fields(config):
        if field.name not in skipped:
            assert f"  --{field.name.replace('_', '-')} " in out


def test_the_installed_command_hands_on_the_exit_code():
    command = Path(sys.executable).with_name("fast-dllm")
    done = subprocess.run([command, "generate", "model"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no prompt")
