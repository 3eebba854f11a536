"""Rows that verify their drafts share the masks of a tick, and their answers do not show it."""

from itertools import groupby

import pytest

from digest import DigestBackbone
from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.engine.engine import Engine
from scripted import ScriptedBackbone

CAUSAL = BlockDiffusionConfig(mask_token_id=15, block_size=8, context_attention="causal")
PROMPTS = [[row % 15] * 9 for row in range(16)]
ASKED = DecodingConfig(max_new_tokens=24, threshold=0.0, stop_token_ids=())


def run(model, budget, rows, asked=ASKED):
    """Answers, and how many masks each tick looked at."""
    engine = Engine(model, CAUSAL, slots=rows, max_length=64, draft_budget=budget, prefix_cache=False)
    requests = [engine.submit(PROMPTS[row], asked) for row in range(rows)]
    looked = []
    while not engine.idle:
        events = engine.step()
        looked.append(sum(event.query_tokens for event in events))
    return [request.state.answer() for request in requests], looked


@pytest.mark.parametrize("budget", [1, 2, 5, 8, 16, 1000])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_answers_do_not_depend_on_it(budget, rows):
    unlimited, _ = run(DigestBackbone("causal"), None, rows)
    assert run(DigestBackbone("causal"), budget, rows)[0] == unlimited


def certain(position, _):
    return position % 7, 0.99


@pytest.mark.parametrize(("budget", "rows", "width"), [(16, 1, 8), (16, 2, 8), (16, 4, 4), (16, 5, 3), (16, 16, 1)])
def test_each_row_drafts_its_share(budget, rows, width):
    model = ScriptedBackbone(certain)
    answers, looked = run(model, budget, rows)
    assert answers == [[position % 7 for position in range(9, 33)]] * rows
    # All drafts are right: a forward commits one, and looks at the next but for its last mask.
    assert looked[2] == rows * (2 * width - 1)
    assert len(looked) == -(-23 // width) + 1


def test_who_stays_drafts_more_when_others_leave():
    model = ScriptedBackbone(certain)
    engine = Engine(model, CAUSAL, slots=4, max_length=64, draft_budget=8, prefix_cache=False)
    long = engine.submit(PROMPTS[0], ASKED)
    others = [engine.submit(PROMPTS[row], ASKED) for row in (1, 2, 3)]
    engine.step()
    engine.step()  # the tick that lets them in counts each with those before it
    assert long.state.block_size == 2
    for request in others:
        engine.cancel(request)
    engine.step()
    assert long.state.block_size == 8


def widths_where_drafts_fail_before(border, max_new_tokens):
    """How wide each forward of a request looks, whose drafts are refused before a position and kept behind it."""

    def wavering(position, call):
        return (call if position < border else position) % 7, 0.99

    engine = Engine(ScriptedBackbone(wavering), CAUSAL, slots=1, max_length=256, draft_budget=16, prefix_cache=False)
    asked = DecodingConfig(max_new_tokens=max_new_tokens, threshold=0.0, stop_token_ids=())
    request = engine.submit(PROMPTS[0], asked)
    widths = []
    while not engine.idle:
        engine.step()
        widths.append(request.state.block_size)
    return widths


def test_a_row_drafts_twice_what_it_has_lately_kept():
    # 8 before anything is known; that a draft is good is known one forward later.
    assert widths_where_drafts_fail_before(12, 48) == [8, 8, 2, 2, 4, 4, 8, 8, 8, 8, 8, 8]


def test_a_row_whose_drafts_all_fail_rests_ever_longer_and_then_drafts_again():
    runs = [(width, len(list(group))) for width, group in groupby(widths_where_drafts_fail_before(140, 200))]
    # A try takes two forwards: one to draft, and one to know.
    rests = [(1, rest) for rest in (4, 8, 16, 32, 32, 32)]
    assert runs == [(8, 2), (2, 3), *(step for rest in rests for step in (rest, (2, 2))), (4, 2), (8, 7)]


def test_the_backbone_names_the_budget_unless_the_engine_is_given_one():
    model = ScriptedBackbone(certain)
    model.draft_budget = 4
    assert run(model, None, 4)[1] == run(ScriptedBackbone(certain), 4, 4)[1]


def test_rows_that_do_not_verify_are_left_alone():
    model = ScriptedBackbone(certain)
    asked = DecodingConfig(max_new_tokens=24, stop_token_ids=(), verify=False)
    assert run(model, 1, 4, asked)[1] == run(model, None, 4, asked)[1]
