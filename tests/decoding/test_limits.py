"""Where an answer ends: stop tokens, the length limit, and what is refused before it begins."""

import pytest

from decoding_cases import MASK, Case, tokens
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import ForwardKind
from fast_dllm.errors import FastDLLMError
from fast_dllm.generation import generate_batch
from scripted import ScriptedBackbone

STOP = 3
CONFIG = BlockDiffusionConfig(mask_token_id=15, block_size=4)


def scripted(script, prompt, *, config=CONFIG, stops=(STOP,), events=None, **settings):
    model = ScriptedBackbone(script, shift=int(config.token_shift))
    on_event = None if events is None else events.append
    return generate_batch(model, config, [prompt], DecodingConfig(**settings), stops, on_event=on_event)


def test_stop_token_with_a_mask_before_it_does_not_stop():
    events = []

    def script(position, call):
        # Position 2 stays unsure until the fourth forward; the stop token at 3 is sure at once.
        return (STOP, 0.99) if position == 3 else (7, 0.2 if position == 2 and call < 3 else 0.5)

    result = scripted(script, [1], events=events, threshold=0.9, max_new_tokens=20)
    assert [event.positions for event in events] == [(3,), (1,), (2,)]
    assert [event.finish for event in events] == [None, None, "stop"]
    assert result.answers == [[7, 7, STOP]]


def test_answer_ends_with_its_first_stop_token_and_nothing_behind_it_counts():
    result = scripted(lambda p, _: (STOP, 0.99) if p in (2, 3) else (7, 0.99), [1], threshold=0.5, max_new_tokens=20)
    assert result.answers == [[7, STOP]]
    assert result.finish == ["stop"]
    assert result.statistics[0].new_tokens == 2
    assert result.statistics[0].revealed_tokens == 3
    assert len(result.confidences[0]) == len(result.reveal_steps[0]) == 2


def test_stop_token_predicted_by_a_commit_stops_without_a_further_forward():
    events = []
    result = scripted(lambda p, _: (STOP if p == 4 else 7, 0.99), [1], events=events, threshold=0.5, max_new_tokens=20)
    assert result.answers == [[7, 7, 7, STOP]]
    assert [event.kind for event in events] == [ForwardKind.BLOCK, ForwardKind.COMMIT]
    assert events[-1].finish == "stop"
    assert events[-1].tokens == (STOP,)


def test_stop_token_predicted_by_the_prefill_stops():
    result = scripted(lambda *_: (STOP, 0.99), [1, 2, 4, 5], max_new_tokens=20)
    assert result.answers == [[STOP]]
    assert result.statistics[0].forwards_by_kind == {"prefill": 1}


def test_stop_tokens_in_the_prompt_are_ignored():
    result = scripted(lambda *_: (7, 0.99), [STOP, STOP, 1], max_new_tokens=5)
    assert result.answers == [[7] * 5]
    assert result.finish == ["length"]


def test_stop_token_behind_the_limit_does_not_matter():
    result = scripted(lambda p, _: (STOP if p == 3 else 7, 0.99), [1], threshold=0.5, max_new_tokens=2)
    assert result.answers == [[7, 7]]
    assert result.finish == ["length"]


def test_request_overrides_the_stop_tokens_of_the_checkpoint():
    def script(position, _):
        return (STOP if position == 2 else 8 if position == 5 else 7, 0.99)

    assert scripted(script, [1], max_new_tokens=6).answers == [[7, STOP]]
    assert scripted(script, [1], max_new_tokens=6, stop_token_ids=(8,)).answers == [[7, STOP, 7, 7, 8]]
    assert scripted(script, [1], max_new_tokens=6, stop_token_ids=()).answers == [[7, STOP, 7, 7, 8, 7]]


def test_last_block_is_not_committed():
    result = scripted(lambda *_: (7, 0.99), [1, 2, 4, 5], max_new_tokens=8, threshold=0.5)
    assert result.answers == [[7] * 8]
    assert result.statistics[0].forwards_by_kind == {"prefill": 1, "block": 2, "commit": 1}


@pytest.mark.parametrize(("prompt_length", "temperature"), [(13, 0.0), (8, 1.0)])
def test_limit_is_exact_and_only_cuts_the_answer(prompt_length, temperature):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8)

    def answer(limit):
        decoding = DecodingConfig(
            max_new_tokens=limit, small_block_size=4, threshold=0.5, temperature=temperature, stop_token_ids=()
        )
        return Case("qwen3", config, tokens(3, prompt_length), decoding).decode().answers[0]

    longest = answer(70)
    assert len(longest) == 70
    for limit in range(1, 70):
        assert answer(limit) == longest[:limit]


@pytest.mark.parametrize("attention", ["block", "causal", "full"])
def test_tokens_are_counted_exactly(attention):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, context_attention=attention)
    decoding = DecodingConfig(max_new_tokens=37, small_block_size=8, threshold=0.5, stop_token_ids=(), verify=False)
    case = Case("llama", config, tokens(5, 21), decoding)
    events = []
    result = case.decode(on_event=events.append)
    statistics = result.statistics[0]
    assert statistics.new_tokens == len(result.answers[0]) == 37
    assert statistics.forwards == len(events)
    for kind in ForwardKind:
        of_kind = [event for event in events if event.kind is kind]
        assert statistics.forwards_by_kind[kind.value] == len(of_kind)
        assert statistics.query_tokens_by_kind[kind.value] == sum(event.query_tokens for event in of_kind)
    assert statistics.revealed_tokens == sum(len(event.tokens) for event in events)
    # Every position is revealed once, in the step that the result names.
    revealed = [position for event in events for position in event.positions]
    assert len(set(revealed)) == len(revealed)
    steps = {position: event.step for event in events for position in event.positions}
    assert result.reveal_steps[0] == [steps[21 + i] for i in range(37)]


def test_settled_grows_and_never_passes_a_mask():
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=32)
    decoding = DecodingConfig(max_new_tokens=50, small_block_size=16, threshold=0.5, stop_token_ids=())
    revealed, last = set(range(9)), 9

    def check(event):
        nonlocal last
        revealed.update(event.positions)
        assert last <= event.settled <= 59
        assert set(range(event.settled)) <= revealed
        assert event.settled == 59 or event.settled not in revealed
        last = event.settled

    Case("qwen3", config, tokens(2, 9), decoding).decode(on_event=check)
    assert last == 59


@pytest.mark.parametrize("attention", ["block", "causal", "full"])
def test_mask_token_in_the_prompt_is_an_ordinary_token(attention):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8, context_attention=attention)
    prompt = [1, MASK, 4, MASK, MASK, 9, 2, MASK, MASK, MASK]
    decoding = DecodingConfig(max_new_tokens=20, threshold=0.5, stop_token_ids=(), verify=False)
    case = Case("qwen2", config, prompt, decoding)
    result = case.decode()
    assert result.sequences[0][:10] == prompt
    assert len(result.answers[0]) == 20
    assert MASK not in result.answers[0]
    assert result.answers == [case.reference()]


def test_empty_prompt_is_refused_under_token_shift():
    with pytest.raises(FastDLLMError, match=r"^empty prompt: .*give at least one$"):
        scripted(lambda *_: (7, 0.9), [])


def test_empty_prompt_is_decoded_without_token_shift():
    config = BlockDiffusionConfig(mask_token_id=15, block_size=4, token_shift=False)
    assert scripted(lambda p, _: (p, 0.9), [], config=config, max_new_tokens=6, stops=()).answers == [
        [0, 1, 2, 3, 4, 5]
    ]


@pytest.mark.parametrize(("small", "block"), [(3, None), (5, 8), (16, 8), (2, 1)])
def test_sub_block_that_does_not_divide_the_block_is_refused_in_one_line(small, block):
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=32)
    with pytest.raises(FastDLLMError, match=f"small_block_size={small} does not divide block_size") as error:
        Case("llama", config, [1], DecodingConfig(small_block_size=small, block_size=block)).decode()
    assert "\n" not in str(error.value)


def test_block_size_of_a_full_attention_model_is_refused():
    config = BlockDiffusionConfig(mask_token_id=MASK, context_attention="full")
    with pytest.raises(FastDLLMError, match="full-attention"):
        Case("llama", config, [1], DecodingConfig(block_size=8)).decode()


def test_no_prompts_are_refused():
    with pytest.raises(FastDLLMError, match="no prompts"):
        generate_batch(ScriptedBackbone(lambda *_: (7, 0.9)), CONFIG, [], DecodingConfig())


def test_blocks_without_a_mask_token_are_refused():
    config = BlockDiffusionConfig(mask_token_id=None, block_size=1, context_attention="causal")
    with pytest.raises(FastDLLMError, match="no mask token"):
        Case("llama", config, [1], DecodingConfig(block_size=8)).decode()


def test_refused_prompt_of_a_batch_is_named_by_its_number():
    with pytest.raises(FastDLLMError, match=r"^prompt 2: empty prompt"):
        generate_batch(ScriptedBackbone(lambda *_: (7, 0.9)), CONFIG, [[1], []], DecodingConfig(max_new_tokens=4))
