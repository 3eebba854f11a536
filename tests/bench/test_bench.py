"""A whole run on a tiny model: what it measures, counts, prints and writes."""

import io
import json
import sys
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench import peers
from fast_dllm.bench.findings import CHECKED_KEYS
from fast_dllm.bench.llamacpp import LlamaCpp
from fast_dllm.bench.options import BenchOptions
from fast_dllm.bench.precision import agree
from fast_dllm.bench.questions import ask_about
from fast_dllm.bench.run import run_bench
from fast_dllm.bench.setting import AR, block_settings, diffusion
from fast_dllm.bench.throughput import ask, standing
from fast_dllm.bench.timing import Timed
from fast_dllm.cli import main
from fast_dllm.errors import FastDLLMError
from fast_dllm.model.cpu_ops import PARTS
from tiny import save_tiny, tiny_tokenizer

STOP = 3
ITEMS = 2
BATCHES = [1, 3]
THREADS = torch.get_num_threads()


def options_for(model, out, **chosen):
    settings = {"dtypes": ["float32"], "items": ITEMS, "batches": BATCHES, "max_new_tokens": 12}
    return BenchOptions(model=model, out=out, **{**settings, **chosen})


def measure(options):
    return run_bench(options, screen=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bench") / "adapted", adapted=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("bench") / "plain", adapted=False)


@pytest.fixture(scope="module")
def whole(adapted, tmp_path_factory):
    """A run of all tables, read back from its file."""
    out = tmp_path_factory.mktemp("out")
    result = measure(options_for(adapted, out))
    saved = json.loads((out / "bench.json").read_text())
    assert saved == json.loads(json.dumps(result.to_dict()))
    return saved


def test_the_last_line_is_the_json_with_every_key(adapted, tmp_path, capsys):
    argv = ["bench", adapted, "--out", str(tmp_path), "--items", "1", "--batch", "1", "--dtype", "float32"]
    assert main([*argv, "--tables", "throughput", "--max-new-tokens", "4"]) == 0
    *tables, last = capsys.readouterr().out.splitlines()
    printed = json.loads(last)
    assert printed == json.loads((tmp_path / "bench.json").read_text())
    assert {*CHECKED_KEYS, "machine", "date", "command", "model", "options", "not_measured"} <= printed.keys()
    assert any("Throughput" in line for line in tables)


def test_every_record_has_value_spread_batch_threshold_dtype_and_accuracy(whole):
    for key in (*CHECKED_KEYS, "forward_s", "first_token_s", "peer_tokens_per_s", "growth"):
        for record in whole[key]:
            low, high = record["spread"]
            assert 0 < low <= record["value"] <= high
            assert {"batch", "threshold", "dtype", "accuracy"} <= record.keys()


def test_ar_and_every_way_of_diffusion_are_measured_at_every_batch_size(whole, adapted):
    assert [record["batch"] for record in whole["ar_tokens_per_s"]] == BATCHES
    for key in ("diffusion_tokens_per_s", "diffusion_over_ar"):
        ways = [(r["batch"], r["sub_block_cache"], r["cache_refresh"]) for r in whole[key]]
        known = block_settings(BlockDiffusionLM.from_pretrained(adapted))
        cases = [(b, way["sub_block_cache"], way.get("cache_refresh")) for b in BATCHES for way in known]
        assert ways == cases
        assert all(0 <= r["accuracy"] <= 1 and 0 <= r["ar_accuracy"] <= 1 for r in whole[key])


def test_ar_has_one_token_per_forward(whole):
    ar = [record for record in whole["tokens_per_forward"] if record["threshold"] is None]
    assert [record["value"] for record in ar] == [1.0] * len(BATCHES)


def test_forwards_are_above_the_roofline_and_their_parts_add_up(whole):
    assert {(r["positions"], r["head"]) for r in whole["forward_s"]} == {
        (positions, head) for positions in (1, 8, 32) for head in (True, False)
    }
    for record in whole["forward_s"]:
        assert record["value"] > record["roofline_s"] > 0
        if record["head"]:
            assert set(record["where_time_goes"]) == set(PARTS)
            assert sum(record["where_time_goes"].values()) == pytest.approx(1)
    (ratio,) = whole["forward8_over_roofline"]
    (timed,) = [r for r in whole["forward_s"] if r["positions"] == 8 and r["head"]]
    assert ratio["value"] == pytest.approx(timed["value"] / timed["roofline_s"])
    assert ratio["context"] == timed["context"]


def test_contexts_beyond_the_model_are_shortened_and_said(whole):
    assert {record["context"] for record in whole["forward_s"]} == {512 - 32}
    assert any("measured at 480" in entry["why"] for entry in whole["not_measured"])


def test_transformers_runs_beside_ours(whole):
    (record,) = whole["ar_over_transformers"]
    assert (record["dtype"], record["threshold"]) == ("float32", None)
    assert record["value"] > 0


def test_peers_make_as_many_tokens_as_ar_decoding_does(whole):
    (ratio,), (peer,) = whole["ar_over_transformers"], whole["peer_tokens_per_s"]
    assert peer["new_tokens"] == ratio["peer_new_tokens"] == ratio["new_tokens"] > 0


def test_llama_cpp_is_told_to_go_on_behind_a_stop_token():
    asked = []
    reply = {"choices": [{"text": "so"}], "timings": {"predicted_n": 7, "predicted_per_second": 2.0}}
    server = LlamaCpp.__new__(LlamaCpp)
    server._pipe = SimpleNamespace(send=asked.append, recv=lambda: reply)
    assert server.complete([1, 2], 7).tokens == 7
    assert (asked[0]["max_tokens"], asked[0]["ignore_eos"]) == (7, True)


def test_decoding_speed_is_compared_with_that_at_the_shortest_context(whole):
    at = {(r["context"], r["threshold"]): r["value"] for r in whole["growth"] if r["batch"] == 1}
    contexts = sorted({context for context, _ in at})
    assert [(r["context"], r["over"]) for r in whole["growth_over_shortest"]] == [(contexts[1], contexts[0])] * 2
    assert all(r["tokens_per_forward"] == 1.0 for r in whole["growth"] if r["threshold"] is None)


def test_precision_compares_every_dtype_with_float32(whole):
    records = whole["precision"]
    assert [(r["dtype"], r["threshold"]) for r in records] == [("float32", None), ("float32", 0.9)]
    for record in records:
        assert (record["same_tokens"], record["same_answers"], record["items"]) == (1.0, 1.0, ITEMS)
        assert 0 <= record["same_in_batch"] <= 1
        share = record["accuracy"]
        assert record["standard_error"] == pytest.approx((share * (1 - share) / ITEMS) ** 0.5)


def test_answers_are_compared_up_to_and_including_the_first_difference():
    same = agree([[1, 2, 3]], [[1, 2, 3]])
    assert (same.same_tokens, same.same_answers) == (1.0, 1.0)
    # Two equal tokens and the differing third; what follows from it counts no more. A stop that came early differs.
    cut = agree([[1, 2, 9, 4, 5], [1, 2, 3], [7]], [[1, 2, 3, 4, 5], [1, 2, 3, 4], [7]])
    assert cut.same_tokens == (2 + 3 + 1) / (3 + 4 + 1)
    assert cut.same_answers == 1 / 3


def test_int8_linear_layers_are_measured_or_named(whole):
    measured = {r["kernel"] for r in whole["linears_s"]}
    named = {entry["what"].removeprefix("int8 linear layers by ") for entry in whole["not_measured"]}
    assert {r["positions"] for r in whole["linears_s"]} == {1, 8, 32}
    for kernel in ("ours", "torch, linear_prepack (fbgemm)", "torch, _weight_int8pack_mm"):
        assert (kernel in measured) != (kernel in named)


def test_a_run_goes_on_where_it_stopped(adapted, tmp_path):
    options = options_for(adapted, tmp_path, batches=[1], resume=True)
    first = measure(replace(options, tables=["throughput"])).to_dict()
    done = first["part_seconds"]
    assert list(done) == ["throughput, batch 1, float32"]
    whole = measure(replace(options, tables=["throughput", "first_token"])).to_dict()
    assert whole["ar_tokens_per_s"] == first["ar_tokens_per_s"]
    assert list(whole["part_seconds"]) == [*done, "first_token"]
    assert whole["first_token_s"]
    assert whole["seconds"] > first["seconds"]
    with pytest.raises(FastDLLMError, match=r"is of another run \(max_new_tokens: 12 there, 13 here\)"):
        measure(replace(options, max_new_tokens=13))
    (tmp_path / "bench.json").write_text('{"half": ')
    with pytest.raises(FastDLLMError, match="no run that can be resumed"):
        measure(options)


def test_absent_peers_are_named(whole):
    assert {entry["what"] for entry in whole["not_measured"]} >= {
        "llama.cpp, its own file",
        "llama.cpp, these weights in f16",
    }


def test_llama_cpp_is_named_where_its_package_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(FastDLLMError, match="xllamacpp is not installed"):
        LlamaCpp(tmp_path / "any.gguf", 1, 64)


@pytest.fixture(scope="module")
def bare(plain, tmp_path_factory):
    """A run on an autoregressive model, with one thread more than before and without matplotlib."""
    import reasoning_gym  # noqa: F401  (it imports matplotlib itself)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        out = tmp_path_factory.mktemp("bare")
        return measure(options_for(plain, out, tables=["throughput"], batches=[1], threads=THREADS + 1)).to_dict()


def test_figures_are_named_where_matplotlib_is_missing(bare):
    assert bare["files"] == []
    assert "matplotlib" in {entry["what"]: entry["why"] for entry in bare["not_measured"]}["figures"]


def test_figures_are_written(whole):
    names = [path.rpartition("/")[2] for path in whole["files"]]
    assert names == ["throughput.png", "accuracy.png", "forwards.png", "where-time-goes.png", "growth.png"]


def test_threads_are_stated_and_given_back(bare):
    assert bare["machine"]["threads"] == THREADS + 1
    assert torch.get_num_threads() == THREADS


def test_a_plain_model_has_ar_alone_and_that_is_said(bare):
    assert len(bare["ar_tokens_per_s"]) == 1
    assert bare["diffusion_tokens_per_s"] == bare["diffusion_over_ar"] == []
    assert "mask token" in {entry["what"]: entry["why"] for entry in bare["not_measured"]}["block diffusion"]


def test_tokens_are_counted_up_to_the_stop(adapted):
    lm = BlockDiffusionLM.from_pretrained(adapted)
    questions = ask_about(lm.tokenizer, ITEMS, seed=0)
    for setting in (AR, diffusion(lm, 0.9)):
        free = ask(lm, questions.prompts, setting, 40).answers
        # Whatever the model says early in its answers becomes its stop token.
        lm.checkpoint.stop_token_ids = (free[0][5],)
        stopped = ask(lm, questions.prompts, setting, 40)
        lm.checkpoint.stop_token_ids = (STOP,)
        lengths = [next((i for i in count(1) if row[i - 1] == free[0][5] or i == len(row)), 0) for row in free]
        found = standing([Timed(2.0, stopped)], questions, ITEMS)
        assert found.new_tokens == sum(lengths)
        assert lengths[0] <= 6
        assert found.rates == [sum(lengths) / 2.0]


def test_questions_are_the_reserved_ones_and_the_seed_chooses():
    tokenizer = tiny_tokenizer()
    first, again, other = (ask_about(tokenizer, 5, seed=seed) for seed in (0, 0, 1))
    assert list(first.items) == list(again.items) != list(other.items)
    assert first.warm_up not in first.prompts


def test_long_prompts_have_the_length_asked_for():
    questions = ask_about(tiny_tokenizer(), 2, seed=0)
    assert [len(questions.long_prompt(length)) for length in (1, 100, 1000)] == [1, 100, 1000]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"tables": ["speed"]}, "table 'speed': unknown; choose from throughput, latency"),
        ({"tables": []}, "no tables chosen"),
        ({"batches": [0]}, "batch=0: must be 1 or more"),
        ({"dtypes": ["float8"]}, "dtype 'float8': unknown; choose from float32, bfloat16"),
        ({"thresholds": [1.5]}, "threshold=1.5: must be a number from 0 to 1"),
        ({"items": 0}, "items=0: must be from 1 to 199"),
        ({"threads": 0}, "threads=0: must be 1 or more"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be 1 or more"),
    ],
)
def test_bad_options_are_refused_on_one_line(chosen, message, tmp_path):
    with pytest.raises(FastDLLMError) as refusal:
        options_for("any", tmp_path, **chosen)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (["--batch", "0"], "error: batch=0"),
        (["--batch", "one"], "error: --batch one: must be numbers"),
        (["--tables", "speed"], "error: table 'speed'"),
        (["--dtype", "float8"], "error: dtype 'float8'"),
    ],
)
def test_the_command_refuses_bad_options_on_one_line(argument, message, capsys):
    assert main(["bench", *argument]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith(message)


def test_an_output_that_is_a_file_is_refused_before_anything_is_measured(adapted, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(FastDLLMError, match="taken: cannot be written"):
        measure(options_for(adapted, tmp_path / "taken"))


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FastDLLMError, match="no such"):
        measure(options_for(str(tmp_path / "nothing"), tmp_path))


@pytest.mark.slow
def test_llama_cpp_answers_with_our_weights_as_we_do(tmp_path):
    pytest.importorskip("xllamacpp")
    result = measure(options_for("smollm2", tmp_path, tables=["peers"], batches=[1], max_new_tokens=64))
    found = result.to_dict()
    assert not [entry for entry in found["not_measured"] if "llama.cpp" in entry["what"]]
    ratios = {record["peer"]: record for record in found["diffusion_over_llamacpp"]}
    assert set(ratios) == {"llama.cpp, its own file", "llama.cpp, these weights in f16"}
    assert all(record["peer_new_tokens"] == record["new_tokens"] for record in found["ar_over_llamacpp"])
    ours = {record["peer"]: record["accuracy"] for record in found["ar_over_llamacpp"]}
    # A wrong permutation of a projection's rows would make nonsense of it.
    assert ratios["llama.cpp, these weights in f16"]["peer_accuracy"] == ours["llama.cpp, these weights in f16"] == 1.0


@pytest.mark.parametrize(("has_bfloat16", "narrow"), [(True, "bfloat16"), (False, "float32")])
def test_transformers_is_not_run_in_what_this_cpu_emulates(monkeypatch, has_bfloat16, narrow):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bfloat16)
    assert [peers._dtype_of_transformers(dtype) for dtype in ("int8", "bfloat16", "float32")] == [
        narrow,
        narrow,
        "float32",
    ]
