"""`BlockDiffusionLM`: what the README shows, on a tiny checkpoint."""

from dataclasses import replace

import pytest
import torch

from decoding_cases import confident_model
from fast_dllm import BlockDiffusionLM, DecodingConfig
from fast_dllm.checkpoint import AUTOREGRESSIVE, Checkpoint, add_mask_token
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.decoding.reference import hf_logits, reference_generate
from fast_dllm.errors import FastDLLMError
from tiny import save_tiny, tiny_model, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "what is 2+3?"}]
VOCABULARY = 64


@pytest.fixture(scope="module")
def lm():
    checkpoint = Checkpoint(
        model=tiny_model("qwen3", vocab_size=VOCABULARY, dtype=torch.float64, tie_word_embeddings=False),
        tokenizer=tiny_tokenizer(),
        config=AUTOREGRESSIVE,
        stop_token_ids=(3,),
        origin="a test",
    )
    checkpoint.model.load_state_dict(confident_model("qwen3").state_dict())
    add_mask_token(checkpoint)
    checkpoint.config = replace(checkpoint.config, block_size=8, context_attention="block")
    return BlockDiffusionLM(checkpoint)


def prompt(length, seed=0):
    return torch.randint(4, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def refusal(call, match):
    with pytest.raises(FastDLLMError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_published_call_returns_prompt_and_answer(lm):
    input_ids = torch.tensor([prompt(11)])
    ids = lm.generate(input_ids, tokenizer=lm.tokenizer, max_new_tokens=30, small_block_size=8, threshold=0.9)
    assert isinstance(ids, torch.Tensor)
    assert ids.shape[0] == 1
    assert ids[0, :11].tolist() == input_ids[0].tolist()
    decoding = DecodingConfig(max_new_tokens=30, small_block_size=8, threshold=0.9)
    logits_of = hf_logits(lm.checkpoint.model, "block", 8)
    assert ids[0, 11:].tolist() == reference_generate(logits_of, prompt(11), lm.config, decoding, (3,))


def test_published_names_are_the_same_settings(lm):
    ours = {"sub_block_cache": "dual", "stop_token_ids": (7,)}
    theirs = {"use_block_cache": True, "stop_token": 7}
    assert lm.generate(prompt(9), max_new_tokens=20, stop_token_ids=7) == lm.generate(
        prompt(9), max_new_tokens=20, stop_token_ids=(7,)
    )
    assert lm.generate(prompt(9), max_new_tokens=20, **ours) == lm.generate(prompt(9), max_new_tokens=20, **theirs)


def test_ids_come_back_in_the_shape_they_came_in(lm):
    settings = {"max_new_tokens": 9, "stop_token": ()}
    row = prompt(6)
    expected = lm.generate(row, **settings)
    assert len(expected) == 15
    assert lm.generate([row], **settings) == [expected]
    assert lm.generate(torch.tensor(row), **settings).tolist() == expected
    assert lm.generate(torch.tensor([row]), **settings).tolist() == [expected]
    assert lm.generate([row, prompt(9)], **settings)[0] == expected


def test_rows_that_end_early_are_padded_with_a_stop_token(lm):
    rows = torch.tensor([prompt(8, seed) for seed in range(6)])
    result = lm.generate(rows, max_new_tokens=40, threshold=0.5, return_dict=True)
    padded = lm.generate(rows, max_new_tokens=40, threshold=0.5)
    assert padded.shape == (6, max(map(len, result.sequences)))
    for sequence, row in zip(result.sequences, padded.tolist(), strict=True):
        assert row[: len(sequence)] == sequence
        assert set(row[len(sequence) :]) <= {3}


def test_result_holds_a_step_and_a_confidence_for_each_new_token(lm):
    result = lm.generate([prompt(5), prompt(12)], max_new_tokens=13, stop_token=(), return_dict=True)
    assert [len(answer) for answer in result.answers] == [13, 13]
    assert [len(steps) for steps in result.reveal_steps] == [13, 13]
    assert all(0 < confidence <= 1 for row in result.confidences for confidence in row)
    assert result.total.new_tokens == 26
    assert result.finish == ["length", "length"]


@pytest.mark.parametrize("token", [-1, VOCABULARY, 10**9])
def test_token_ids_out_of_range_are_refused(lm, token):
    refusal(
        lambda: lm.generate([[1, 2], [1, token]], max_new_tokens=9),
        f"prompt 2: token id {token} is not in the vocabulary",
    )
    refusal(lambda: lm.stream([1, token]), "ids run from 0 to 63")
    refusal(
        lambda: list(lm.answers([[1, 2], [1, token]], DecodingConfig(max_new_tokens=9))), f"prompt 2: token id {token}"
    )
    if token > 0:
        refusal(lambda: lm.generate([1, 2], mask_id=token), f"mask token id {token} is not in the vocabulary")


def test_malformed_calls_are_refused_in_one_line(lm):
    refusal(lambda: lm.generate([]), "no prompts")
    refusal(lambda: lm.generate([[]]), "empty prompt")
    refusal(lambda: lm.generate(prompt(3), small_block_size=3), "does not divide")
    refusal(
        lambda: lm.generate(prompt(3), treshold=0.5), "unknown key 'treshold'; the nearest known one is 'threshold'"
    )
    refusal(lambda: lm.generate(prompt(3), stop_strings=("a",)), "stop_strings need text")
    refusal(lambda: lm.chat(MESSAGES, mode="fast"), "mode='fast'")
    refusal(lambda: lm.chat([{"role": "user"}]), "content")
    refusal(lambda: list(lm.answers([MESSAGES, [{"role": "user"}]])), "prompt 2: message 1 has no")
    refusal(lambda: list(lm.answers([[1], []])), "prompt 2: messages is empty")
    refusal(lambda: list(lm.answers([[1], [2]], [DecodingConfig()])), "2 prompts, but settings for 1")
    refusal(lambda: lm.generate([1, 2], max_batch=0), "max_batch=0")
    refusal(lambda: lm.stream(torch.tensor([[5, 6]])), "one row of ids")
    refusal(lambda: DecodingConfig(stop_token_ids=5), "must be a tuple of token ids")
    refusal(lambda: DecodingConfig(temperature=1e-40), "temperature=1e-40: must be 0")
    refusal(lambda: DecodingConfig(top_p=1e-46), "top_p=1e-46: must be at least")


def test_stream_of_text_put_together_is_the_reply(lm):
    decoding = DecodingConfig(max_new_tokens=40, threshold=0.5)
    events = list(lm.stream(MESSAGES, decoding))
    reply = lm.chat(MESSAGES, max_new_tokens=40, threshold=0.5)
    assert "".join(event.text for event in events) == reply.text
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish == reply.finish
    assert len(reply.reveal_steps) == len(reply.confidences) == len(reply.ids) == reply.statistics.new_tokens
    assert reply.seconds > 0
    shown = [token for token in reply.ids if token != 3]
    assert reply.text == lm.tokenizer.decode(shown, skip_special_tokens=True)


def test_ids_stream_like_the_messages_they_come_from(lm):
    decoding = DecodingConfig(max_new_tokens=20)
    ids = lm.tokenizer(
        lm.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )["input_ids"]
    by_ids = "".join(event.text for event in lm.stream(list(ids), decoding))
    assert by_ids == "".join(event.text for event in lm.stream(MESSAGES, decoding))


def test_stop_string_cuts_the_answer_and_ends_the_request(lm):
    whole = lm.chat(MESSAGES, max_new_tokens=40, stop_token_ids=())
    stop = whole.text[9:11]
    reply = lm.chat(MESSAGES, max_new_tokens=40, stop_token_ids=(), stop_strings=(stop,))
    assert reply.text == whole.text[: whole.text.index(stop)]
    assert reply.finish == "stop"
    assert reply.statistics.forwards < whole.statistics.forwards


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_what_is_decoded_behind_a_stop_string_does_not_count(lm, mode):
    settings = {"mode": mode, "threshold": 0.02, "stop_token_ids": ()}
    whole = lm.chat(MESSAGES, max_new_tokens=60, **settings)
    stop = whole.text[20:22]
    end = whole.text.index(stop) + len(stop)
    tokens = len(lm.chat(MESSAGES, max_new_tokens=60, stop_strings=(stop,), **settings).ids)
    assert tokens < 40
    for limit in range(tokens, tokens + 12):  # an answer may reach its limit in the event that completes the string
        reply = lm.chat(MESSAGES, max_new_tokens=limit, stop_strings=(stop,), **settings)
        assert (reply.finish, reply.text + stop) == ("stop", whole.text[:end])
        assert lm.tokenizer.decode(reply.ids, skip_special_tokens=True) == whole.text[:end]
        assert (
            reply.statistics.new_tokens == tokens == len(reply.ids) == len(reply.reveal_steps) == len(reply.confidences)
        )


def test_answers_of_many_prompts_are_the_answers_of_each(lm):
    prompts = [MESSAGES, [{"role": "user", "content": "tell me more"}], prompt(9)]
    decoding = DecodingConfig(max_new_tokens=40, threshold=0.5, stop_token_ids=())
    stop = lm.chat(MESSAGES, **decoding.to_dict()).text[5:7]
    decoding = replace(decoding, stop_strings=(stop,))
    together = list(lm.answers(prompts, decoding, max_batch=2))
    assert len(together) == 3
    for row, reply in zip(prompts, together, strict=True):
        alone = next(lm.answers([row], decoding))
        assert (reply.text, reply.ids, reply.finish) == (alone.text, alone.ids, alone.finish)
        assert stop not in reply.text
    assert together[0].finish == "stop"


def test_ar_mode_decodes_one_token_per_forward_with_the_same_weights(lm):
    reply = lm.chat(MESSAGES, max_new_tokens=12, mode="ar", stop_token_ids=())
    assert reply.statistics.tokens_per_forward == 1.0
    logits_of = hf_logits(lm.checkpoint.model, "block", 1)
    ids = lm.tokenizer(
        lm.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )["input_ids"]
    decoding = DecodingConfig(max_new_tokens=12, block_size=1, stop_token_ids=())
    assert reply.ids == reference_generate(logits_of, ids, lm.config, decoding)


@pytest.mark.parametrize("attention", ["block", "causal", "full"])
def test_call_gives_logits_under_the_checkpoint_s_attention(lm, attention):
    other = BlockDiffusionLM(replace(lm.checkpoint, config=replace(lm.config, context_attention=attention)))
    ids = torch.tensor([prompt(20), prompt(20, 1)])
    logits = other(ids).logits
    for row, expected_ids in zip(logits, ids, strict=True):
        expected = hf_logits(lm.checkpoint.model, attention, 8)(expected_ids[None], 20)
        torch.testing.assert_close(row, expected, atol=1e-10, rtol=1e-10)


def test_saved_model_answers_the_same(lm, tmp_path):
    lm.save_pretrained(tmp_path / "out")
    loaded = BlockDiffusionLM.from_pretrained(tmp_path / "out", device="cpu")
    assert loaded.config == lm.config
    reply = loaded.chat(MESSAGES, max_new_tokens=30, threshold=0.5)
    assert reply.ids == lm.chat(MESSAGES, max_new_tokens=30, threshold=0.5).ids


def test_settings_of_the_checkpoint_may_be_overridden_on_loading(lm, tmp_path):
    lm.save_pretrained(tmp_path / "out")
    loaded = BlockDiffusionLM.from_pretrained(tmp_path / "out", device="cpu", block_size=4, context_attention="causal")
    assert loaded.config == BlockDiffusionConfig(
        mask_token_id=lm.config.mask_token_id, block_size=4, context_attention="causal"
    )


def test_unknown_backbone_and_missing_directory_are_refused(tmp_path):
    refusal(lambda: BlockDiffusionLM.from_pretrained(tmp_path, backbone="fast"), "backbone='fast'")
    refusal(lambda: BlockDiffusionLM.from_pretrained(tmp_path / "nowhere"), "no such file or directory")


def test_int8_runs_on_the_cpu_also_where_there_is_an_accelerator(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path / "model", adapted=True, architecture="llama")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("meta"))
    assert BlockDiffusionLM.from_pretrained(directory).checkpoint.model.device.type == "meta"
    assert BlockDiffusionLM.from_pretrained(directory, dtype="int8").chat(MESSAGES, max_new_tokens=4).ids
