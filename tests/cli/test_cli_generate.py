import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

from fast_dllm import BlockDiffusionLM, DecodingConfig

SHORT = ("--max-new-tokens", 12)


def asked(text):
    return [{"role": "user", "content": text}]


def test_prompt_gives_one_row(run, adapted):
    outcome = run("generate", adapted, "--prompt", "hello there", *SHORT)
    assert (outcome.code, outcome.err) == (0, "")
    (row,) = outcome.rows()
    assert list(row) == ["id", "prompt", "text", "finish", "new_tokens", "forwards", "tokens_per_forward", "seconds"]
    assert (row["id"], row["prompt"]) == (0, "hello there")
    assert row["new_tokens"] <= 12
    assert row["tokens_per_forward"] == round(row["new_tokens"] / row["forwards"], 3)


def test_text_is_what_the_library_answers(run, adapted):
    options = {"threshold": 0.02, "temperature": 0.7, "seed": 5, "small_block_size": 4, "sub_block_cache": "dual"}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    (row,) = run("generate", adapted, "--prompt", "hello", *SHORT, *flags).rows()
    reply = BlockDiffusionLM.from_pretrained(adapted).chat(asked("hello"), max_new_tokens=12, **options)
    assert row["text"] == reply.text
    assert row["forwards"] == reply.statistics.forwards


def test_file_of_prompts_keeps_order_and_ids(run, adapted, tmp_path):
    file, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    texts = ["one", "a longer prompt, which ends later than others", "three", "four", "five"]
    file.write_text("".join(json.dumps({"id": f"q{n}", "prompt": text}) + "\n\n" for n, text in enumerate(texts)))
    outcome = run("generate", adapted, "--prompt-file", file, "--out", out, "--batch-size", 2, *SHORT)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["q0", "q1", "q2", "q3", "q4"]
    assert [row["prompt"] for row in rows] == texts
    model = BlockDiffusionLM.from_pretrained(adapted)
    assert [row["text"] for row in rows] == [model.chat(asked(text), max_new_tokens=12).text for text in texts]


def test_the_seconds_of_all_rows_are_those_of_decoding(run, adapted, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    start = time.perf_counter()
    rows = run("generate", adapted, "--prompt-file", file, "--batch-size", 1, *SHORT).rows()
    assert 0 < sum(row["seconds"] for row in rows) < time.perf_counter() - start
    assert min(row["seconds"] for row in rows) > 0


def test_conversations_come_back_as_messages(run, adapted, tmp_path):
    file = tmp_path / "prompts.jsonl"
    turns = [*asked("hi"), {"role": "assistant", "content": "hello"}, *asked("bye")]
    file.write_text(json.dumps({"messages": turns}))
    (row,) = run("generate", adapted, "--prompt-file", file, *SHORT).rows()
    assert row["messages"] == turns


def test_standard_input_is_a_file_of_prompts_or_one_prompt(run, adapted):
    rows = run("generate", adapted, "--prompt-file", "-", *SHORT, stdin=b"one\ntwo\n").rows()
    assert [row["prompt"] for row in rows] == ["one", "two"]
    (row,) = run("generate", adapted, "--prompt", "-", *SHORT, stdin=b"one\ntwo\n").rows()
    assert row["prompt"] == "one\ntwo\n"


def test_ar_mode_takes_one_forward_a_token(run, adapted):
    (row,) = run("generate", adapted, "--prompt", "hello", "--mode", "ar", *SHORT).rows()
    assert row["tokens_per_forward"] == 1


def test_answers_end_before_the_first_stop_string(run, adapted, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    whole = run("generate", adapted, "--prompt-file", file, "--max-new-tokens", 40).rows()
    stop = whole[1]["text"][5:7]
    rows = run("generate", adapted, "--prompt-file", file, "--max-new-tokens", 40, "--stop", stop).rows()
    assert [row["text"] for row in rows] == [row["text"].partition(stop)[0] for row in whole]
    assert rows[1]["finish"] == "stop"
    assert rows[1]["forwards"] < whole[1]["forwards"]
    chosen = DecodingConfig(max_new_tokens=40, stop_strings=(stop,))
    stream = BlockDiffusionLM.from_pretrained(adapted).stream(asked("two"), chosen)
    text = ""
    for event in stream:
        text += event.text
        if event.finish is not None:
            break
    assert rows[1]["text"] == text


def test_a_terminal_gets_text_unless_json_is_asked_for(run, adapted, monkeypatch):
    (row,) = run("generate", adapted, "--prompt", "hello", *SHORT).rows()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    outcome = run("generate", adapted, "--prompt", "hello", *SHORT)
    assert outcome.out == row["text"] + "\n"
    assert "tokens per forward" in outcome.err
    (again,) = run("generate", adapted, "--prompt", "hello", "--json", *SHORT).rows()
    assert again | {"seconds": 0} == row | {"seconds": 0}


def test_a_pipe_is_written_to_and_stays_a_pipe(run, adapted, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as pool:
        read = pool.submit(pipe.read_text)
        assert run("generate", adapted, "--prompt", "hello", "--out", pipe, *SHORT).code == 0
        assert json.loads(read.result(timeout=10))["prompt"] == "hello"
    assert pipe.is_fifo()


def test_a_failure_half_way_leaves_the_earlier_file(run, adapted, tmp_path, monkeypatch):
    def fail(_):
        raise KeyboardInterrupt

    out = tmp_path / "answers.jsonl"
    out.write_text("earlier\n")
    monkeypatch.setattr("fast_dllm.engine.engine.Engine.step", fail)
    outcome = run("generate", adapted, "--prompt", "hello", "--out", out)
    assert (outcome.code, outcome.err) == (130, "interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]
    assert out.read_text() == "earlier\n"


def test_a_plain_model_can_be_given_a_mask_token(run, plain):
    flags = ("--mask-token-id", 60, "--block-size", 8, *SHORT)
    (row,) = run("generate", plain, "--prompt", "hello", *flags).rows()
    assert row["forwards"] > 1
