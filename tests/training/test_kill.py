"""A killed process loses nothing but time: the same command ends with the weights of a run that was left alone."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tiny import save_tiny

FLAGS = ["--steps", "40", "--batch-size", "2", "--max-length", "64", "--block-size", "8", "--eval-samples", "2"]
FLAGS += ["--save-every", "3", "--lora-rank", "0", "--probe-items", "1", "--eval-every", "10"]


@pytest.fixture
def command(tmp_path):
    save_tiny(tmp_path / "base", adapted=False)
    rows = [
        [{"role": "user", "content": f"add {n} and 1"}, {"role": "assistant", "content": f"it is {n + 1}."}]
        for n in range(40)
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    code = "import torch, sys; torch.set_num_threads(1); from fast_dllm.cli import main; sys.exit(main())"

    def build(out: Path, *more: str) -> list[str]:
        data = ["--model", str(tmp_path / "base"), "--data", str(chats), "--out", str(out)]
        return [sys.executable, "-c", code, "adapt", *data, *FLAGS, *more]

    return build


def steps_done(run: Path) -> int:
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def kill_at(command: list[str], out: Path, step: int, delay: float) -> None:
    """SIGKILL some moments after a step was logged: in a forward, a save, or between."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while steps_done(out.with_name(f"{out.name}.run")) < step:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def check(command, tmp_path: Path, kills: int, *more: str) -> None:
    subprocess.run(command(tmp_path / "whole", *more), check=True, capture_output=True)
    rng = random.Random(kills)
    out = tmp_path / "killed"
    for step in sorted(rng.sample(range(1, 38), kills)):
        kill_at(command(out, *more), out, step, delay=rng.uniform(0, 0.03))
        assert not out.exists()
    subprocess.run(command(out, *more), check=True, capture_output=True)
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    for name, weight in whole.items():
        assert weight.equal(killed[name]), name


@pytest.mark.timeout(300)
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(command, tmp_path):
    check(command, tmp_path, 2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "more", [pytest.param((), id="rows", marks=pytest.mark.slow), pytest.param(("--pack",), id="packed")]
)
def test_a_killed_run_over_a_stream_too(command, tmp_path, more):
    check(command, tmp_path, 2, "--stream", "--shuffle-buffer", "8", *more)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_killed_five_times_too(command, tmp_path):
    check(command, tmp_path, 5)


def test_half_written_files_are_neither_resumed_from_nor_in_the_way(command, tmp_path):
    out = tmp_path / "killed"
    kill_at(command(out), out, 8, delay=0)
    run = out.with_name("killed.run")
    half = run / "checkpoint-999"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"\x08\x00")
    (half / "trainer_state.json").write_text('{"global_st')
    (run / ".options.json.abc").write_text('{"sour')
    done = subprocess.run(command(out), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "40 of 40" in done.stdout
    assert not half.exists()
