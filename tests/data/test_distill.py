import json
from itertools import islice
from types import SimpleNamespace

import pytest

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.data.distill import autoregressive, distill
from fast_dllm.data.prompts import Prompt
from fast_dllm.data.sources import BadRows, Source, read_documents
from fast_dllm.errors import FastDLLMError
from tiny import save_tiny

# A random model of 64 tokens: sampled, about half of its answers end within 40 tokens.
SAMPLED = autoregressive(max_new_tokens=40, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return BlockDiffusionLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("model"), adapted=False))


def asked(count, place="prompts.txt"):
    return [Prompt([{"role": "user", "content": f"question {n}"}], f"q{n}", f"{place}:{n + 1}") for n in range(count)]


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_chats_are_the_models_own_finished_answers_one_token_at_a_time(model, tmp_path):
    prompts = asked(12)
    result = distill(model, prompts, tmp_path / "chats.jsonl", SAMPLED, batch_size=5)
    replies = list(model.answers([prompt.messages for prompt in prompts], SAMPLED))
    assert all(reply.statistics.tokens_per_forward == 1 for reply in replies)
    kept = [n for n, reply in enumerate(replies) if reply.finish == "stop" and reply.text.strip()]
    assert 0 < len(kept) < 12
    assert written(tmp_path / "chats.jsonl") == [
        {"id": f"q{n}", "messages": [*prompts[n].messages, {"role": "assistant", "content": replies[n].text}]}
        for n in kept
    ]
    assert (result.prompts, result.kept) == (12, len(kept))
    assert result.unfinished == sum(reply.finish == "length" for reply in replies)
    assert result.kept + result.unfinished + result.empty == 12
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


def test_what_is_written_can_be_trained_on(model, tmp_path):
    out = tmp_path / "chats.jsonl"
    result = distill(model, asked(12), out, SAMPLED)
    documents = list(read_documents(Source(source=str(out)), BadRows()))
    assert len(documents) == result.kept
    assert all(document.content[-1]["role"] == "assistant" for document in documents)


def test_unfinished_answers_are_kept_on_request_and_empty_ones_never(model, tmp_path):
    decoding = DecodingConfig(block_size=1, small_block_size=1, max_new_tokens=3)
    finished = distill(model, asked(6), tmp_path / "a.jsonl", decoding)
    kept = distill(model, asked(6), tmp_path / "b.jsonl", decoding, keep_unfinished=True)
    assert (finished.kept, finished.unfinished) == (0, 6)
    assert (tmp_path / "a.jsonl").read_text() == ""
    texts = [row["messages"][-1]["content"] for row in written(tmp_path / "b.jsonl")]
    assert len(texts) == kept.kept > 0
    assert all(text.strip() for text in texts)


@pytest.mark.parametrize("stop_after", [0, 1, 7, 39])
@pytest.mark.parametrize("tail", ["", '{"finish": "st'])
def test_a_stopped_run_goes_on_and_ends_the_same(model, tmp_path, stop_after, tail):
    prompts, whole, out = asked(40), tmp_path / "whole.jsonl", tmp_path / "chats.jsonl"
    expected = distill(model, prompts, whole, SAMPLED, batch_size=4)

    class StoppedError(Exception):
        pass

    def stopped(answers, done):
        yield from islice(answers, stop_after)
        raise StoppedError

    with pytest.raises(StoppedError):
        distill(model, prompts, out, SAMPLED, batch_size=4, watch=stopped)
    assert not out.exists()
    part = tmp_path / "chats.jsonl.part"
    with part.open("a") as file:
        file.write(tail)
    seen = []

    def watch(answers, done):
        seen.append(done)
        for answer in answers:
            seen.append(answer.text)
            yield answer

    assert distill(model, prompts, out, SAMPLED, batch_size=3, watch=watch) == expected
    assert out.read_text() == whole.read_text()
    assert seen[0] == stop_after
    assert len(seen) == 1 + 40 - stop_after
    assert not part.exists()


@pytest.mark.parametrize("change", ["model", "prompts", "settings"])
def test_a_part_of_another_run_is_refused(model, tmp_path, change):
    out = tmp_path / "chats.jsonl"
    with pytest.raises(ZeroDivisionError):
        distill(model, asked(3), out, SAMPLED, name="one", watch=lambda answers, done: 1 / 0)
    prompts = asked(4 if change == "prompts" else 3)
    decoding = autoregressive(max_new_tokens=9) if change == "settings" else SAMPLED
    with pytest.raises(FastDLLMError, match=r"chats\.jsonl\.part: belongs to a run with another model, prompts or"):
        distill(model, prompts, out, decoding, name="two" if change == "model" else "one")


def test_a_damaged_part_and_an_earlier_outcome_are_refused(model, tmp_path):
    out = tmp_path / "chats.jsonl"
    (tmp_path / "chats.jsonl.part").write_text("{broken\n")
    with pytest.raises(FastDLLMError, match=r"\.part: is damaged .*remove it"):
        distill(model, asked(2), out, SAMPLED)
    (tmp_path / "chats.jsonl.part").unlink()
    out.write_text("mine")
    with pytest.raises(FastDLLMError, match="is there already; remove it"):
        distill(model, asked(2), out, SAMPLED)
    with pytest.raises(FastDLLMError, match="cannot be written"):
        distill(model, asked(2), tmp_path / "no" / "chats.jsonl", SAMPLED)


def test_prompts_too_long_are_refused_by_place_or_left_out(model, tmp_path):
    prompts = asked(8)
    for number in (0, 3, 4, 7):
        prompts[number].messages[0]["content"] = "a" * 600
    with pytest.raises(FastDLLMError, match=r"^prompts\.txt:1: prompt of .* exceed"):
        distill(model, prompts, tmp_path / "a.jsonl", SAMPLED)
    (tmp_path / "a.jsonl.part").unlink()
    bad = BadRows(skip=True)
    result = distill(model, prompts, tmp_path / "a.jsonl", SAMPLED, bad=bad)
    assert result.refused == bad.count == 4
    whole = distill(model, asked(8), tmp_path / "b.jsonl", SAMPLED)
    assert whole.refused == 0
    refused = {f"q{number}" for number in (0, 3, 4, 7)}
    assert written(tmp_path / "a.jsonl") == [row for row in written(tmp_path / "b.jsonl") if row["id"] not in refused]


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": text} for place, text in enumerate(texts)]


class Parrot:
    """Answers with the last question and how much came before; what has "endless" in it reaches the limit."""

    def __init__(self):
        self.asked = []

    def answers(self, prompts, decoding, *, max_batch):
        for messages in prompts:
            if "too long" in messages[-1]["content"]:
                raise FastDLLMError("prompt exceeds the model's positions")

        def replies():
            for number, messages in enumerate(prompts):
                question = messages[-1]["content"]
                self.asked.append((decoding.seed + number, messages))
                finish = "length" if "endless" in question else "stop"
                yield SimpleNamespace(text=f"{question} after {len(messages) - 1}", finish=finish)

        return replies()


def test_every_answer_of_a_conversation_is_the_models_own(tmp_path):
    system = {"role": "system", "content": "be brief"}
    prompts = [
        Prompt([system, *turns("a", "theirs", "b", "theirs", "c")], 1),
        Prompt(turns("d")),
        Prompt([*turns("e", "theirs"), {"role": "assistant", "content": "theirs too"}, *turns("f", "theirs")]),
        Prompt([system, {"role": "assistant", "content": "a greeting"}, *turns("g", "theirs")]),
    ]
    model = Parrot()
    result = distill(model, prompts, tmp_path / "chats.jsonl", SAMPLED)
    assert written(tmp_path / "chats.jsonl") == [
        {"id": 1, "messages": [system, *turns("a", "a after 1", "b", "b after 3", "c", "c after 5")]},
        {"messages": turns("d", "d after 0")},
        {"messages": turns("e", "e after 0", "f", "f after 2")},
        {"messages": [system, *turns("g", "g after 1")]},
    ]
    assert (result.prompts, result.kept) == (4, 4)
    assert [seed for seed, _ in model.asked] == list(range(5, 12))


@pytest.mark.parametrize("keep_unfinished", [False, True])
def test_a_conversation_is_written_as_far_as_it_was_answered(tmp_path, keep_unfinished):
    prompts = [
        Prompt(turns("a", "theirs", "b endless", "theirs", "c")),
        Prompt(turns("too long", "theirs", "d"), place="chats.jsonl:2"),
        Prompt(turns("e", "theirs", "too long"), place="chats.jsonl:3"),
    ]
    bad = BadRows(skip=True)
    model, out = Parrot(), tmp_path / "chats.jsonl"
    result = distill(model, prompts, out, SAMPLED, keep_unfinished=keep_unfinished, bad=bad)
    unfinished = turns("a", "a after 0", "b endless", "b endless after 2")
    assert [row["messages"] for row in written(out)] == [
        unfinished if keep_unfinished else unfinished[:2],
        turns("e", "e after 0"),
    ]
    assert (result.kept, result.unfinished, result.refused) == (2, 1, 2)
    assert bad.examples == ["chats.jsonl:2: prompt exceeds the model's positions"]


@pytest.mark.parametrize("stop_after", range(8))
def test_a_stopped_run_goes_on_within_its_conversations(model, tmp_path, stop_after):
    prompts = [Prompt(turns(f"q{n}", "theirs", f"r{n}", "theirs", f"s{n}")) for n in range(6)]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "chats.jsonl"
    decoding = autoregressive(max_new_tokens=90, temperature=1.0, seed=5)
    expected = distill(model, prompts, whole, decoding)
    assert max(len(row["messages"]) for row in written(whole)) == 6

    def stopped(answers, done):
        yield from islice(answers, stop_after)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        distill(model, prompts, out, decoding, watch=stopped)
    assert distill(model, prompts, out, decoding) == expected
    assert out.read_text() == whole.read_text()
