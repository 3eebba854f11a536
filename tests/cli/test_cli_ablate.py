import json

import pytest

FAST = ("--steps", 2, "--batch-size", 2, "--max-length", 256, "--block-size", 8, "--lora-rank", 2)


@pytest.mark.timeout(300)
def test_every_variant_is_trained_and_asked(run, plain, tmp_path):
    pytest.importorskip("reasoning_gym")
    flags = ("--task", "chain_sum", "--task-items", 4, "--items", 2, "--seeds", 2, "--eval-samples", 0)
    outcome = run("ablate", plain, "--out", tmp_path, *FAST, *flags)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out.splitlines()[-1])["outcomes"]
    assert [variant["published"] for variant in found] == [41.3, 42.2, 45.0, None]
    assert all(len(variant["right"]) == 2 and 0 <= variant["mean"] <= 1 for variant in found)
    assert all(variant["tokens_per_forward"][0] > 0 for variant in found)
    trained = [json.loads((tmp_path / f"{n}-seed-1.run" / "options.json").read_text()) for n in (1, 2, 3, 4)]
    assert [run["pad_to_block"] for run in trained] == [False, True, True, True]
    assert [run["complementary"] for run in trained] == [False, False, True, True]
    assert [run["context_attention"] for run in trained] == ["block", "block", "block", "causal"]
    assert {run["seed"] for run in trained} == {1}
    other = ("--task", "leg_counting", *flags[2:])
    outcome = run("ablate", plain, "--out", tmp_path, *FAST, *other)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 2)  # the first variant, and why not
    assert "other settings (data)" in outcome.err


def test_options_that_do_not_go_with_a_variant_are_refused_before_any_is_trained(run, plain, tmp_path):
    pytest.importorskip("reasoning_gym")
    outcome = run("ablate", plain, "--out", tmp_path / "out", *FAST, "--no-token-shift", "--task-items", 4)
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
    assert "leave token_shift on" in outcome.err
    assert not (tmp_path / "out").exists()


def test_lengths_that_are_no_blocks_are_refused(run):
    outcome = run("bench-train", "--lengths", "100")
    assert (outcome.code, len(outcome.err.splitlines())) == (2, 1)
