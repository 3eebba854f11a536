"""A run in several halves is one run: the same model, machine, peaks and contestants."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fast_dllm import machine
from fast_dllm.bench import peaks, peers, run
from fast_dllm.bench.options import BenchOptions
from fast_dllm.bench.run import run_bench
from fast_dllm.bench.setting import AR
from fast_dllm.checkpoint.fingerprint import digest, fingerprint
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from tiny import save_tiny, tiny_model

PEAKS = peaks.Peaks(1, 25e9, {"float32": 50e9})


@pytest.fixture(autouse=True)
def peaks(monkeypatch):
    """Peaks that take no time to measure."""
    monkeypatch.setattr(run, "measure_peaks", lambda _: PEAKS)


@pytest.fixture
def options(tmp_path):
    path = save_tiny(tmp_path / "model", adapted=True)
    sizes = {"dtypes": ["float32"], "items": 1, "batches": [1], "max_new_tokens": 4}
    return BenchOptions(model=path, out=tmp_path / "out", resume=True, threads=1, **sizes)


def measure(options, *tables):
    found = run_bench(replace(options, tables=tables), screen=Console(file=io.StringIO()))
    return json.loads(json.dumps(found.to_dict()))


def skipped(found, what):
    return [entry["why"] for entry in found["not_measured"] if entry["what"] == what]


def test_other_weights_in_the_same_place_are_another_run(options, tmp_path):
    measure(options, "first_token")
    save_tiny(tmp_path / "model", adapted=True, seed=1)
    with pytest.raises(FastDLLMError, match=r"is of another run \(model's weights: "):
        measure(options, "first_token")


def test_an_adapter_trained_further_is_told_from_what_it_was():
    model = wrap_with_lora(tiny_model("llama"), 4, AdaptOptions(lora_rank=2, dtype="float32"), None)
    before = fingerprint(model), digest(model)
    assert (fingerprint(model), digest(model)) == before
    name, last = [(name, weight) for name, weight in model.named_parameters() if "lora_B" in name][-1]
    with torch.no_grad():
        last[-1, -1] += 1
    assert digest(model) != before[1], name


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cores": 99}, "cores: "),
        ({"cpu_capability": "ABACUS"}, "cpu_capability: "),
        ({"versions": {**machine.describe()["versions"], "torch": "0.1"}}, "version of torch: .* there, 0.1 here"),
    ],
)
def test_another_machine_or_library_is_another_run(options, monkeypatch, changed, message):
    measure(options, "first_token")
    here = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**here, **changed})
    with pytest.raises(FastDLLMError, match=rf"is of another run \({message}"):
        measure(options, "first_token")


def test_a_file_that_knows_no_weights_is_of_another_run(options):
    saved = measure(options, "first_token")
    del saved["model"]["weights"]
    (options.out / "bench.json").write_text(json.dumps(saved))
    with pytest.raises(FastDLLMError, match="model's weights: None there"):
        measure(options, "first_token")


def test_rooflines_of_one_file_rest_on_one_measurement(options, monkeypatch):
    first = measure(options, "first_token")
    monkeypatch.setattr(run, "measure_peaks", lambda _: peaks.Peaks(1, 1e9, {"float32": 1e9}))
    whole = measure(options, "first_token", "latency")
    assert whole["machine"] == first["machine"]
    for record in whole["forward_s"]:
        least = max(record["bytes"] / PEAKS.bandwidth, record["flops"] / PEAKS.flops["float32"])
        assert record["roofline_s"] == pytest.approx(least)


def test_a_part_that_failed_is_tried_again(options, monkeypatch):
    def attempt(number, why):
        def measure_some(bench):
            bench.findings.add("precision", [1.0], dtype="float32")
            bench.findings.skip("a peer", f"not here, attempt {number}")
            if why:
                raise FastDLLMError(why)

        monkeypatch.setattr(run, "measure_precision", measure_some)
        return measure(options, "precision")

    for number, why in enumerate(["out of luck", "out of memory"]):
        failed = attempt(number, why)
        assert skipped(failed, "precision") == [why]
        assert (failed["part_seconds"], failed["precision"]) == ({}, [])
    for number in (2, 3):
        done = attempt(number, None)
        assert skipped(done, "precision") == []
        assert list(done["part_seconds"]) == ["precision"]
        assert len(done["precision"]) == 1
        # What no attempt could measure is named once. The last one had nothing left to do.
        assert skipped(done, "a peer") == ["not here, attempt 2"]


def test_peers_race_the_fastest_of_the_throughput_table_after_a_pause_too(options, monkeypatch):
    found = measure(options, "throughput")
    fastest, as_right = found["diffusion_tokens_per_s"][3:5]
    found["ar_tokens_per_s"][0]["accuracy"] = as_right["accuracy"] = 1.0
    fastest["value"], as_right["value"] = 2e9, 1e9
    (options.out / "bench.json").write_text(json.dumps(found))
    raced = []
    monkeypatch.setattr(run, "measure_peers", lambda bench: raced.extend(peers._our_contestants(bench)))
    measure(options, "throughput", "peers")
    assert [dtype for dtype, _ in raced] == ["float32"] * 3
    assert raced[0][1] is AR
    for (_, setting), record in zip(raced[1:], (fastest, as_right), strict=True):
        assert setting.threshold == record["threshold"]
        assert {name: record[name] for name in setting.labels()} == setting.labels()
