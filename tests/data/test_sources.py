import io
import json
import sys
import tracemalloc

import pytest

from fast_dllm.data import sources
from fast_dllm.data.prompts import Prompt, read_prompts
from fast_dllm.data.sources import BadRows, Source, parse_sources, read_documents
from fast_dllm.errors import FastDLLMError

CHAT = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]
GOOD = json.dumps({"messages": CHAT})


def read_chats(path, bad=None, **options):
    """The contents of a source's rows."""
    bad = BadRows() if bad is None else bad
    return [document.content for document in read_documents(Source(source=str(path)), bad, **options)]


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
    with pytest.raises(FastDLLMError, match=r"bad\.json row:1: output is int, not a string"):
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
        ('{"txt": "x"}', r"no messages \(keys: txt\); each row must be"),
        ('{"text": 1}', "text is int, not a string"),
        ('{"text": " "}', "text is empty"),
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


@pytest.mark.parametrize("read", [read_chats, read_prompts])
def test_missing_empty_and_directory_are_named(tmp_path, read):
    with pytest.raises(FastDLLMError, match="no such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(FastDLLMError, match="is a directory"):
        read(tmp_path)
    for content in (b"", b"\n \n"):
        with pytest.raises(FastDLLMError, match=r"has no (rows|prompts)"):
            read(write(tmp_path / "empty.jsonl", content))


@pytest.mark.parametrize("stream", [False, True])
def test_a_parquet_file_is_read_through_datasets(tmp_path, monkeypatch, stream):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "chats.parquet"
    datasets.Dataset.from_list([{"messages": CHAT}] * 2).to_parquet(str(path))
    assert read_chats(path, stream=stream) == [CHAT, CHAT]
    datasets.Dataset.from_list([{"txt": "x"}]).to_parquet(str(tmp_path / "bad.parquet"))
    with pytest.raises(FastDLLMError, match=r"bad\.parquet row:1: no messages"):
        read_chats(tmp_path / "bad.parquet", stream=stream)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """There is no hub here: `datasets` reads the directory "owner/name" as it reads a repository."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "hub" / "owner" / "name"
    repository.mkdir(parents=True)
    write(repository / "first.jsonl", json.dumps({"text": "not this"}))
    write(repository / "second.jsonl", GOOD, GOOD)
    card = "---\nconfigs:\n- {config_name: one, data_files: [{split: train, path: first.jsonl}]}\n"
    card += "- {config_name: two, data_files: [{split: extra, path: second.jsonl}]}\n---\n"
    (repository / "README.md").write_text(card)
    assert Source(source="owner/name").is_hub_name
    # From here on the name is a directory too: Source itself would call it one.
    monkeypatch.chdir(tmp_path / "hub")
    monkeypatch.setattr(Source, "is_hub_name", True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_name_is_loaded_with_its_subset_and_split(hub, stream):
    source = Source(source="owner/name", subset="two", split="extra")
    documents = list(read_documents(source, BadRows(), stream=stream))
    assert [(document.place, document.content) for document in documents] == [
        ("owner/name two extra row:1", CHAT),
        ("owner/name two extra row:2", CHAT),
    ]


def test_a_hub_name_may_have_a_dot(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [source] = parse_sources("teknium/OpenHermes-2.5:2")
    assert source == Source(source="teknium/OpenHermes-2.5", weight=2)
    assert source.is_hub_name
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "there-2.5").touch()
    for name in ("a.jsonl", "a.json", "a.PARQUET", "a.txt", "a.md", "there-2.5"):
        assert not Source(source=f"data/{name}").is_hub_name, name


def test_a_hub_data_set_that_does_not_come_is_one_line():
    pytest.importorskip("datasets")
    with pytest.raises(FastDLLMError, match=r"^owner/name: datasets cannot load it \(.*\)$"):
        read_chats("owner/name")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FastDLLMError, match=r"pip install '\.\[train\]'"):
        read_chats("owner/name")


def test_a_jsonl_file_needs_no_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert read_chats(write(tmp_path / "chats.jsonl", GOOD)) == [CHAT]


@pytest.mark.parametrize("name", ["notes.txt", "notes.md"])
def test_a_text_file_is_one_document(tmp_path, name):
    assert read_chats(write(tmp_path / name, b"\xef\xbb\xbfOne\r", "two", "", "three")) == ["One\ntwo\n\nthree"]


def test_text_rows_and_conversations_may_be_mixed(tmp_path):
    path = write(tmp_path / "mixed.jsonl", json.dumps({"text": "Once upon a time"}), GOOD)
    assert read_chats(path) == ["Once upon a time", CHAT]


def test_bad_rows_are_counted_and_told_when_they_may_be_skipped(tmp_path):
    path = write(tmp_path / "chats.jsonl", GOOD, "{broken", b"\xff", GOOD, messages(CHAT[0]))
    bad = BadRows(skip=True)
    assert read_chats(path, bad) == [CHAT, CHAT]
    assert read_chats(path, bad) == [CHAT, CHAT]
    assert bad.count == 3
    assert [example.split(" ")[0] for example in bad.examples] == [f"{path}:{line}:" for line in (2, 3, 5)]


def test_of_bad_rows_without_end_the_first_are_kept_and_the_others_counted(monkeypatch):
    monkeypatch.setattr(sources, "_REMEMBERED", 100)
    bad = BadRows(skip=True)
    tracemalloc.start()
    for _ in range(2):
        for row in range(100):
            bad.add(f"row:{row}", FastDLLMError("long " * 1000))
    assert bad.count == 100
    for row in range(100, 2000):
        bad.add(f"row:{row}", FastDLLMError("long " * 1000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert bad.count == 2000
    assert len(bad.examples) == 5
    assert held < 200_000


def test_a_source_of_bad_rows_only_is_refused_all_the_same(tmp_path):
    with pytest.raises(FastDLLMError, match="has no rows"):
        read_chats(write(tmp_path / "chats.jsonl", "{broken"), BadRows(skip=True))


def test_rows_are_read_one_at_a_time(tmp_path):
    path = write(tmp_path / "chats.jsonl", GOOD, GOOD, "{broken")
    documents = read_documents(Source(source=str(path)), BadRows())
    assert next(documents).place == f"{path}:1"
    assert next(documents).place == f"{path}:2"
    with pytest.raises(FastDLLMError, match=":3: not JSON"):
        next(documents)


def test_sources_are_named_with_weights_in_every_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd:7", GOOD)
    assert parse_sources("a.jsonl") == [Source(source="a.jsonl")]
    assert parse_sources("a.jsonl:2") == [Source(source="a.jsonl", weight=2)]
    assert parse_sources("owner/name:0.5") == [Source(source="owner/name", weight=0.5)]
    assert parse_sources("a.jsonl:b") == [Source(source="a.jsonl:b")]
    assert parse_sources("odd:7") == [Source(source="odd:7")]  # a file of that name
    both = [Source(source="a.jsonl", weight=2), Source(source="o/n", subset="s", split="test")]
    assert parse_sources(["a.jsonl:2", {"source": "o/n", "subset": "s", "split": "test"}]) == both
    assert parse_sources('["a.jsonl:2", {"source": "o/n", "subset": "s", "split": "test"}]') == both


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ("a.jsonl:0", "weight=0.0: must be a number above 0"),
        ("a.jsonl:nan", "weight=nan"),
        ("a.jsonl:-1", "weight=-1.0"),
        ('{"source": "a", "weight": true}', "weight=True"),
        ('{"source": "a", "wieght": 1}', "unknown key 'wieght'; a source has source, weight, subset, split"),
        ('{"source": 1}', "source=1: must be a string"),
        ("{}", 'no "source"'),
        ("[", "not JSON"),
        ([], "must name a file"),
        (None, "must name a file"),
    ],
)
def test_a_source_that_is_none_is_named(data, error):
    with pytest.raises(FastDLLMError, match=error):
        parse_sources(data)


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


def test_an_answer_at_the_end_is_left_out_where_a_new_one_is_wanted(tmp_path):
    rows = [
        {"messages": [*CHAT, *CHAT], "id": 3},
        {"instruction": "2 + 3?", "output": "5"},
        {"conversations": [{"from": "human", "value": "2 + 3?"}]},
    ]
    path = write(tmp_path / "chats.jsonl", *map(json.dumps, rows))
    assert read_prompts(path, replace_answers=True) == [
        Prompt([*CHAT, CHAT[0]], 3),
        Prompt([CHAT[0]]),
        Prompt([CHAT[0]]),
    ]


PROMPT_ROWS = [{"messages": CHAT, "id": "x1"}, {"messages": [CHAT[0]], "id": "x2"}]
PROMPTS = [asked("2 + 3?", "x1"), asked("2 + 3?", "x2")]


def test_prompts_are_read_from_what_training_data_is_read_from(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    array, parquet = write(tmp_path / "chats.json", json.dumps(PROMPT_ROWS, indent=2)), tmp_path / "chats.parquet"
    datasets.Dataset.from_list(PROMPT_ROWS).to_parquet(str(parquet))
    for path in (array, parquet):
        prompts = read_prompts(path, replace_answers=True)
        assert prompts == PROMPTS
        assert [prompt.place for prompt in prompts] == [f"{path} row:1", f"{path} row:2"]
        with pytest.raises(FastDLLMError, match=r"row:1: the last message is the assistant's"):
            read_prompts(path)
    both = json.dumps([str(array), {"source": str(parquet)}])
    assert read_prompts(both, replace_answers=True) == PROMPTS * 2


def test_prompts_are_read_from_a_hub_data_set(hub):
    found = read_prompts('{"source": "owner/name", "subset": "two", "split": "extra"}', replace_answers=True)
    assert found == [asked("2 + 3?")] * 2
    assert found[1].place == "owner/name two extra row:2"


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.json", '[{"text": "x"}]', r"a\.json row:1: no prompt \(keys: text\); each row must be"),
        ("a.json", "[3]", r'a\.json row:1: a JSON int, not an object; write {"prompt"'),
        ("a.json", "[]", r"a\.json: has no prompts"),
        ("a.jsonl", '{"prompt": null}', r"a\.jsonl:1: no prompt \(keys: prompt\)"),
    ],
)
def test_a_bad_source_of_prompts_is_named(tmp_path, name, content, error):
    with pytest.raises(FastDLLMError, match=error):
        read_prompts(write(tmp_path / name, content))


def test_prompts_have_no_weight(tmp_path):
    path = write(tmp_path / "prompts.txt", "first")
    with pytest.raises(FastDLLMError, match=r"prompts\.txt: prompts are asked once each, so they have no weight"):
        read_prompts(f"{path}:2")


def test_a_prompt_beside_its_conversation_is_left_to_the_conversation(tmp_path):
    path = write(tmp_path / "chats.jsonl", json.dumps({"prompt": "2 + 3?", "messages": [*CHAT, *CHAT]}))
    [prompt] = read_prompts(path, replace_answers=True)
    assert prompt.messages == [*CHAT, CHAT[0]]
    with pytest.raises(FastDLLMError, match="both prompt and messages"):
        read_prompts(path)


def test_a_column_of_messages_may_be_empty_where_there_is_a_prompt(tmp_path):
    path = write(tmp_path / "prompts.jsonl", json.dumps({"prompt": "2 + 3?", "messages": None}))
    assert read_prompts(path) == [asked("2 + 3?")]


def test_bad_prompts_are_skipped_and_counted_on_request(tmp_path):
    path = write(tmp_path / "prompts.jsonl", '{"prompt": "fine"}', "{", '{"prompt": ""}')
    bad = BadRows(skip=True)
    assert [prompt.place for prompt in read_prompts(path, bad=bad)] == [f"{path}:1"]
    assert bad.count == 2
