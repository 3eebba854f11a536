import io
import json
import sys

import pytest

from fast_dllm.data.sources import Prompt, load_chats, read_chats, read_prompts
from fast_dllm.errors import FastDLLMError

CHAT = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
GOOD = json.dumps({"messages": CHAT})


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT, "source": "ours"},
        {"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]},
        {"conversations": CHAT},
        {"instruction": "2 + 3?", "output": "5"},
        {"instruction": "2 + 3?", "input": "", "output": "5"},
    ],
)
def test_every_layout_of_a_row_is_the_same_conversation(tmp_path, row):
    assert read_chats(write(tmp_path / "chats.jsonl", json.dumps(row))) == [CHAT]


def test_system_and_input_are_kept(tmp_path):
    path = write(
        tmp_path / "chats.jsonl",
        json.dumps({"instruction": "Add.", "input": "2 3", "output": "5", "system": "Be brief."}),
        json.dumps({"conversations": CHAT, "system": "Be brief."}),
    )
    alpaca, sharegpt = read_chats(path)
    assert alpaca[0] == sharegpt[0] == {"role": "system", "content": "Be brief."}
    assert alpaca[1]["content"] == "Add.\n\n2 3"


def test_blank_lines_carriage_returns_and_byte_order_marks_are_skipped(tmp_path):
    path = write(tmp_path / "chats.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b"\r", "", "  ", GOOD, "")
    assert read_chats(path) == [CHAT, CHAT]


def test_line_separators_inside_a_string_do_not_end_the_row(tmp_path):
    chat = [CHAT[0], {"role": "assistant", "content": "a\u2028b\x85c"}]
    path = write(tmp_path / "chats.jsonl", json.dumps({"messages": chat}, ensure_ascii=False))
    assert read_chats(path) == [chat]


def test_a_json_array_is_read_as_rows(tmp_path):
    path = write(tmp_path / "alpaca.json", json.dumps([{"instruction": "2 + 3?", "output": "5"}] * 2, indent=2))
    assert read_chats(path) == [CHAT, CHAT]
    bad = write(tmp_path / "bad.json", json.dumps([{"instruction": "2 + 3?", "output": 5}]))
    with pytest.raises(FastDLLMError, match="row:1: output is int, not a string"):
        read_chats(bad)


def messages(*turns):
    return json.dumps({"messages": list(turns)})


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{not json", r'not JSON \(Expecting .*\); each line must be {"messages"'),
        ("[1]", "a JSON list, not an object; each line must be"),
        ("[" * 100_000, "nested too deeply|not JSON"),
        ("{}", r"no messages \(keys: none\)"),
        ('{"text": "x"}', r"no messages \(keys: text\); each row must be"),
        ('{"messages": "x"}', "messages must be a list"),
        ('{"messages": []}', "messages is empty"),
        (messages(CHAT[0], {"role": "bot", "content": "5"}), "message 2: role 'bot' is unknown; use system"),
        (messages(CHAT[0], {"role": ["a"], "content": "5"}), "message 2: role"),
        (messages(CHAT[0], {"role": "assistant", "content": None}), "message 2: content is NoneType, not a string"),
        (messages(CHAT[0], {"role": "assistant"}), 'message 2 has no "content"'),
        (messages(CHAT[0], "hello"), "message 2 is not an object"),
        (messages(CHAT[0]), "no assistant turn"),
        (messages(CHAT[1], CHAT[0]), "the assistant speaks before the user"),
        ('{"conversations": "x"}', "conversations is not a list"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "message 1: from 'alien' is unknown"),
        ('{"conversations": [{"from": ["a"], "value": "x"}]}', "message 1: from"),
        ('{"conversations": [{"from": "human"}]}', 'message 1 has no "value"'),
        ('{"instruction": 1, "output": "x"}', "instruction is int, not a string"),
        ('{"instruction": "x", "input": 3, "output": "x"}', "input is int, not a string"),
        (b'{"messages": "\xff"}', r"not UTF-8 \(invalid start byte\)"),
    ],
)
def test_a_bad_row_is_one_line_that_names_file_and_line(tmp_path, line, error):
    path = write(tmp_path / "chats.jsonl", GOOD, "", line)
    with pytest.raises(FastDLLMError, match=error) as caught:
        read_chats(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [read_chats, read_prompts, load_chats])
def test_missing_empty_and_directory_are_named(tmp_path, read):
    with pytest.raises(FastDLLMError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(FastDLLMError, match="is a directory"):
        read(tmp_path)
    for content in (b"", b"\n \n"):
        with pytest.raises(FastDLLMError, match=r"has no (rows|prompts)"):
            read(write(tmp_path / "empty.jsonl", content))


def test_a_parquet_file_is_read_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "chats.parquet"
    datasets.Dataset.from_list([{"messages": CHAT}] * 2).to_parquet(str(path))
    assert load_chats(path) == [CHAT, CHAT]
    datasets.Dataset.from_list([{"text": "x"}]).to_parquet(str(tmp_path / "bad.parquet"))
    with pytest.raises(FastDLLMError, match=r"bad\.parquet row:1: no messages"):
        load_chats(tmp_path / "bad.parquet")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FastDLLMError, match=r"pip install 'fast-dllm\[train\]'"):
        load_chats("owner/name")


def test_a_jsonl_file_needs_no_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_chats(write(tmp_path / "chats.jsonl", GOOD)) == [CHAT]


def asked(text, identity=None):
    return Prompt([{"role": "user", "content": text}], identity)


def test_prompts_of_both_kinds_keep_their_id(tmp_path):
    rows = [{"prompt": "a", "id": "x1"}, {"messages": [CHAT[0]], "id": 7}, {"prompt": "c"}]
    path = write(tmp_path / "prompts.jsonl", *map(json.dumps, rows))
    assert read_prompts(path) == [asked("a", "x1"), asked("2 + 3?", 7), asked("c")]


def test_a_text_file_has_one_prompt_per_line(tmp_path):
    path = write(tmp_path / "prompts.txt", "first", "", '{"second"}', "  third")
    assert read_prompts(path) == [asked("first"), asked('{"second"}'), asked("  third")]


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b'{"prompt": "a"}\n', [asked("a")]), (b"a\nb\n", [asked("a"), asked("b")])],
)
def test_standard_input_is_jsonl_when_it_begins_with_a_brace(monkeypatch, content, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert read_prompts("-") == expected


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("plain text", "not JSON"),
        ('{"prompt": 3}', "prompt is int, not a string"),
        ('{"text": "x"}', r"no prompt \(keys: text\)"),
        ('{"prompt": "a", "messages": []}', "both prompt and messages"),
        ('{"prompt": "a", "id": [1]}', "id is list"),
        (GOOD, "the last message is the assistant's; end with a user message"),
    ],
)
def test_a_bad_prompt_names_file_and_line(tmp_path, line, error):
    path = write(tmp_path / "prompts.jsonl", '{"prompt": "fine"}', line)
    with pytest.raises(FastDLLMError, match=error) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
