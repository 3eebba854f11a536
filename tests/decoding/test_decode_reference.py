"""The decode loop against the cache-free oracle, token for token."""

from hypothesis import given, settings

from decoding_cases import cases
from fast_dllm.decoding.events import ForwardKind


def test_decoding_equals_the_reference_token_for_token():
    revealed = steps = stopped = 0

    @settings(max_examples=250)
    @given(cases())
    def check(case):
        nonlocal revealed, steps, stopped
        result = case.decode(on_event=count)
        assert result.answers == [case.reference()]
        stopped += result.finish == ["stop"]

    def count(event):
        nonlocal revealed, steps
        if event.kind is ForwardKind.BLOCK:
            steps += 1
            revealed += len(event.tokens)

    check()
    # Cases that reveal one token a step, or never meet a stop token, would prove little.
    assert revealed / steps > 1.3
    assert stopped > 50
