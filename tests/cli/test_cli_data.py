import json

import pytest

from tiny import tiny_tokenizer


@pytest.fixture
def mixed(tmp_path):
    """Two conversations, a text, and a bad row."""
    path = tmp_path / "mixed.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    long = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello " * 20}]
    rows = [{"messages": turns}, {"messages": long}, {"text": "once upon a time"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    return path


def test_loss_and_block_borders_are_marked_in_plain_text(run, plain, mixed):
    outcome = run("data", mixed, "--model", plain, "--rows", 1, "--block-size", 16)
    assert (outcome.code, outcome.err) == (0, "")
    # <|im_start|> u s e r \n h i <|im_end|> \n <|im_start|> a s s i s | t a n t \n h e l l o <|im_end|> \n
    assert outcome.out.startswith(
        f"{mixed}:1: 28 tokens, 7 learned, 2 blocks\n"
        "<|im_start|>user↵\nhi<|im_end|>↵\n<|im_start|>assis│tant↵\n⟦hello<|im_end|>↵\n⟧\n"
    )


def test_statistics_count_everything_that_is_lost(run, plain, mixed):
    outcome = run("data", mixed, "--model", plain, "--skip-bad-rows", "--max-length", 64, "--json", "--samples", 9)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["statistics"] == {
        "samples": 3,
        "tokens": 28 + 64 + 17,
        "response_tokens": 7 + 43 + 16,
        "lengths": {"shortest": 17, "median": 28, "percentile_90": 64, "longest": 64},
        "truncated": 1,
        "lost_ends": 1,
        "dropped": 0,
        "skipped_rows": 1,
    }
    # Rows of 32, 64 and 32 tokens: alone, a batch of 3 is padded to 64; packed, 64 and 32 + 32.
    assert found["padding"] == {"rows_of_one": round(1 - 109 / 192, 4), "packed": round(1 - 109 / 128, 4)}
    assert found["skipped"][0].startswith(f"{mixed}:4: not JSON")
    tokenizer = tiny_tokenizer()
    for sample in found["samples"]:
        assert tokenizer.decode(sample["input_ids"]) == sample["text"]
        assert len(sample["loss_mask"]) == len(sample["input_ids"])
    assert [sample["truncated"] for sample in found["samples"]] == [False, True, False]


def test_the_first_bad_row_is_an_error_by_default(run, plain, mixed):
    outcome = run("data", mixed, "--model", plain)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {mixed}:4: not JSON")


def test_colours_say_the_same_on_a_terminal(run, plain, mixed, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    outcome = run("data", mixed, "--model", plain, "--rows", 1, "--block-size", 16)
    assert "\x1b[32mh\x1b[0m\x1b[32me\x1b[0m" in outcome.out
    assert "\x1b[35m│\x1b[0m" in outcome.out


def test_sources_are_drawn_by_weight_as_the_seed_has_it(run, plain, chats, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(chats.read_text().replace("add", "sum"))
    command = ("data", f"{chats}:3", f"{other}:1", "--model", plain, "--json", "--samples", 200)
    places = [sample["place"] for sample in json.loads(run(*command).out)["samples"]]
    assert places == [sample["place"] for sample in json.loads(run(*command).out)["samples"]]
    shares = [sum(str(path) in place for place in places) / len(places) for path in (chats, other)]
    assert shares[0] == pytest.approx(0.75, abs=0.08)
    shuffled = json.loads(run(*command, "--shuffle-buffer", 20, "--seed", 1).out)["samples"]
    assert {sample["place"] for sample in shuffled} == set(places)
    assert [sample["place"] for sample in shuffled] != places


def test_nothing_to_learn_is_no_error(run, plain, chats):
    outcome = run("data", chats, "--model", plain, "--max-length", 8)
    assert outcome.code == 0, outcome.err
    assert "dropped          40 samples with nothing to learn" in outcome.out


def test_only_the_tokenizer_of_the_model_is_read(run, plain, chats, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    assert run("data", chats, "--model", plain).code == 0
