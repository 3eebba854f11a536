import json

import pytest

from fast_dllm.bench.training import OURS, PLAIN, Step, measure_training, run_step
from fast_dllm.errors import FastDLLMError

SHAPE = {"model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}


@pytest.mark.parametrize("answer_share", [1.0, 0.4])
def test_both_steps_compute_one_loss(answer_share):
    ours, plain = (run_step(Step(name, 128, answer_share, 0, 1, 1, SHAPE)) for name in (OURS, PLAIN))
    assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)


def test_the_race_gives_a_record_of_every_quantity():
    records = measure_training([64], rounds=1, steps=1, threads=1, shape=SHAPE).records
    assert {name: len(found) for name, found in records.items()} == {
        "tokens_per_s": 2,
        "peak_bytes": 2,
        "speedup": 1,
        "memory_share": 1,
    }
    assert all(record["value"] > 0 and record["length"] == 64 for found in records.values() for record in found)
    ours, plain = records["tokens_per_s"]
    assert (ours["attention"], plain["attention"]) == ("fast_dllm_in_pieces", "sdpa")
    assert records["speedup"][0]["value"] == pytest.approx(ours["value"] / plain["value"])
    json.dumps(records)


def test_a_dead_process_is_named():
    with pytest.raises(FastDLLMError, match="the ours step at 64 tokens died"):
        measure_training([64], rounds=1, steps=1, threads=1, shape={**SHAPE, "hidden_size": 33})
