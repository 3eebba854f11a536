"""Two processes (gloo, on the CPU) give the losses of one with the same global batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import save_tiny

HERE = Path(__file__).parent
SCRIPT = str(HERE / "parallel_run.py")
RECIPES = HERE.parent.parent / "recipes"
OPTIONS = {"steps": 20, "learning_rate": 3e-3, "warmup_steps": 0, "max_length": 64, "block_size": 8}
OPTIONS |= {"save_every": 10, "eval_every": 10, "dtype": "float32"}
BFLOAT16 = {"dtype": "bfloat16"}


def start(base: str, out: Path, launcher: list[str], *flags: str, **options: object) -> subprocess.CompletedProcess:
    command = [*launcher, SCRIPT, base, str(out), json.dumps(OPTIONS | options), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def run(base: str, out: Path, launcher: list[str], *flags: str, **options: object) -> list[dict[str, float]]:
    done = start(base, out, launcher, *flags, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return log_of(out)


def log_of(out: Path) -> list[dict[str, float]]:
    log = out.with_name(f"{out.name}.run") / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(config: str, processes: int = 2) -> list[str]:
    flags = ["--config_file", str(RECIPES / config), "--num_processes", str(processes)]
    flags += ["--main_process_port", free_port()]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("config", "flags", "options"),
    [
        pytest.param("ddp.yaml", [], {"lora_rank": 0}, id="ddp"),
        pytest.param("ddp.yaml", [], {"lora_rank": 4}, id="ddp-lora", marks=pytest.mark.slow),
        pytest.param("ddp.yaml", [], {"lora_rank": 0, "stream": True, "pack": True}, id="ddp-stream"),
        pytest.param("fsdp2.yaml", ["--fsdp"], {"lora_rank": 0, "accumulation": 2}, id="fsdp2"),
        pytest.param("fsdp2.yaml", ["--fsdp"], {"lora_rank": 0, "accumulation": 2, **BFLOAT16}, id="fsdp2-bfloat16"),
    ],
)
def test_two_processes_train_as_one(tmp_path, config, flags, options):
    base = save_tiny(tmp_path / "base", adapted=False)
    share = 2 * options.get("accumulation", 1)
    one = run(base, tmp_path / "one", [sys.executable], batch_size=8, **{**options, "accumulation": 1})
    two = run(base, tmp_path / "two", launch(config), *flags, batch_size=8 // share, **options)
    exact = "dtype" not in options
    counts = {"loss": 20, "eval_loss": 3, "eval_tokens_per_forward": 3, "response_tokens_seen": 20}
    for name, count in counts.items():
        ours, theirs = ([line[name] for line in lines if name in line] for lines in (two, one))
        assert len(ours) == count
        # What is measured is rounded, to 1e-4 and 1e-3. In bfloat16 rows of another shape round otherwise, and decode
        # in bfloat16 only where they are sharded.
        tolerances = {"loss": 1e-5, "eval_loss": 1.1e-4, "eval_tokens_per_forward": 1.1e-3}
        tolerance = tolerances.get(name, 0) if exact else 0.05
        assert ours == pytest.approx(theirs, abs=tolerance)
    sharded = (tmp_path / "two.run" / "checkpoint-20" / "pytorch_model_fsdp_0").exists()
    assert sharded == bool(flags)
    name = "adapter_model.safetensors" if options["lora_rank"] else "model.safetensors"
    whole, parallel = (load_file(tmp_path / run / name) for run in ("one", "two"))
    assert whole.keys() == parallel.keys()
    for weight in whole:
        assert whole[weight] == pytest.approx(parallel[weight], abs=1e-3 if exact else 0.1), weight
    shutil.rmtree(tmp_path / "two")
    shutil.rmtree(tmp_path / "two.run" / "checkpoint-20")
    run(base, tmp_path / "two", launch(config), *flags, batch_size=8 // share, **options)
    resumed = load_file(tmp_path / "two" / name)
    for weight in parallel:
        assert torch.equal(resumed[weight], parallel[weight]), weight


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("config", "flags"), [("ddp.yaml", []), ("fsdp2.yaml", ["--fsdp"])], ids=["ddp", "fsdp2"])
def test_a_run_of_two_processes_goes_on_with_one(tmp_path, config, flags):
    base, out = save_tiny(tmp_path / "base", adapted=False), tmp_path / "out"
    run(base, out, launch(config), *flags, batch_size=4, lora_rank=0)
    two = load_file(out / "model.safetensors")
    shutil.rmtree(out)
    shutil.rmtree(tmp_path / "out.run" / "checkpoint-20")
    launcher, kind = ([sys.executable], []) if flags else (launch("fsdp2.yaml", 1), ["--fsdp"])
    other = start(base, out, launcher, *kind, batch_size=8, lora_rank=0)
    assert other.returncode != 0
    assert f"the run began {'with' if flags else 'without'} FSDP" in other.stderr
    log = run(base, out, launch(config, 1) if flags else [sys.executable], *flags, batch_size=8, lora_rank=0)
    assert sum("loss" in line for line in log) == 20
    for name, weight in load_file(out / "model.safetensors").items():
        assert torch.allclose(weight, two[name], atol=1e-3), name


@pytest.mark.timeout(300)
def test_a_process_whose_time_is_up_ends_the_run_for_all(tmp_path):
    base = save_tiny(tmp_path / "base", adapted=False)
    options = {"batch_size": 4, "max_minutes": 30.0, "lora_rank": 0}
    lines = run(base, tmp_path / "out", launch("ddp.yaml"), "--fast-clock", **options)
    [step] = [line for line in lines if "loss" in line]
    assert step["elapsed_s"] >= 30 * 60  # so that who goes on with the save trains no more, whichever clock it was


@pytest.mark.timeout(300)
def test_the_command_of_two_processes_is_that_of_one(tmp_path):
    base, data = save_tiny(tmp_path / "base", adapted=False), tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"add {n} and 1"}, {"role": "assistant", "content": f"it is {n + 1}."}]
        for n in range(40)
    ]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = ["--steps", "6", "--warmup-steps", "0", "--learning-rate", "3e-3", "--dtype", "float32", "--lora-rank"]
    options += ["0", "--max-length", "64", "--block-size", "8", "--eval-samples", "2"]
    scripts = Path(sys.executable).parent
    torchrun = [str(scripts / "torchrun"), "--nproc_per_node", "2", "--master_port", free_port(), "--no-python"]

    def run_command(name: str, launcher: list[str], batch_size: int) -> subprocess.CompletedProcess[str]:
        command = [*launcher, str(scripts / "fast-dllm"), "adapt", "--model", base, "--data", str(data)]
        command += ["--out", str(tmp_path / name), "--batch-size", str(batch_size), *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    one, two = run_command("one", [], 4), run_command("two", torchrun, 2)
    told = [line.split()[0] for line in one.stdout.splitlines()]
    assert told == ["samples", "held-out", "steps", "time", "checkpoint", "next"]
    assert [line.split()[0] for line in two.stdout.splitlines()] == told
    steps = [line for line in two.stderr.splitlines() if line.startswith("step 1 of 6")]
    assert len(steps) == 1
    losses = [[line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    whole, parallel = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(whole[name], parallel[name], atol=1e-3) for name in whole)
