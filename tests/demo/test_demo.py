"""The demo end to end on tiny models: what it writes, and that it resumes."""

import io
import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from fast_dllm.demo import compare, live, run, run_demo
from fast_dllm.demo.live import live_options
from fast_dllm.demo.picture import colour_of, loss_chart, reveal_picture
from fast_dllm.demo.report import render_html
from fast_dllm.errors import FastDLLMError
from fast_dllm.training.callbacks import RunClock
from tiny import save_tiny

VOID = {"meta", "br", "hr", "input", "link", "img"}
QUESTIONS = 3
STEPS = 12


class Page(HTMLParser):
    """Checks that tags are closed in order; collects boxes, scripts and whatever would load a resource."""

    def __init__(self, text):
        super().__init__()
        self.open, self.figures, self.scripts, self.external, self.text = [], [], 0, [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.external += [value for key, value in attrs.items() if key in ("src", "href")]
        self.scripts += tag == "script"
        classes = (attrs.get("class") or "").split()
        if "answer" in classes:
            self.figures.append({"diffusion": 0, "ar": 0})
        if "panel" in classes:
            self.panel = "diffusion" if "diffusion" in classes else "ar"
        if "t" in classes:
            self.figures[-1][self.panel] += 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def _losses(log):
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [(entry["step"], entry["loss"], entry["elapsed_s"]) for entry in entries if "loss" in entry]


def console():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module", autouse=True)
def _short():
    """Less to train on, an end by steps (a busy machine makes few in a time), and shorter answers."""
    options = live.live_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "live_options", lambda *asked: replace(options(*asked), steps=STEPS))
        patch.setattr(run, "_LIVE_TRAINING", 64)
        for mode, decoding in compare.DECODING.items():
            patch.setitem(compare.DECODING, mode, replace(decoding, max_new_tokens=40))
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One whole run: its settings, what it returned and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    settings = {
        "model": save_tiny(folder / "adapted", adapted=True),
        "base": save_tiny(folder / "base", adapted=False),
        "out": folder / "out",
        "minutes": 5.0,
        "questions": QUESTIONS,
    }
    screen = console()
    report = run_demo(**settings, console=screen)
    return settings, report, screen.file.getvalue()


@pytest.fixture(scope="module")
def saved(demo):
    settings, _, _ = demo
    return json.loads((settings["out"] / "report.json").read_text())


def test_report_on_disk_is_the_one_returned(demo, saved):
    assert saved == json.loads(json.dumps(demo[1]))


def test_report_has_numbers_of_both_modes(saved):
    for key in ("accuracy", "tokens_per_forward", "tokens_per_s"):
        assert set(saved[key]) == {"ar", "diffusion"}
        assert all(isinstance(value, float) for value in saved[key].values())
    assert saved["speedup"] == saved["tokens_per_s"]["diffusion"] / saved["tokens_per_s"]["ar"]
    assert saved["tokens_per_forward"]["ar"] == 1
    assert {"cpu", "threads", "python", "versions"} <= set(saved["machine"])
    assert saved["settings"]["dtype"] == "float32"
    assert saved["settings"]["ar"]["block_size"] == 1
    assert saved["settings"]["diffusion"]["max_new_tokens"] == saved["settings"]["ar"]["max_new_tokens"]
    assert saved["machine"]["threads"] >= 1
    assert "adapted" in saved["model"]


def test_report_has_every_question(saved):
    assert len(saved["questions"]) == QUESTIONS
    for question in saved["questions"]:
        assert {"task", "question", "answer", "prompt_length", "ar", "diffusion"} == set(question)
        for mode in ("ar", "diffusion"):
            answer = question[mode]
            assert answer["seconds"] > 0
            assert answer["forwards"] > 0
            assert isinstance(answer["correct"], bool)
            assert len(answer["tokens"]) == len(answer["reveal_steps"]) == answer["new_tokens"]
            assert max(answer["reveal_steps"]) < answer["forwards"]


def test_live_adaptation_is_recorded(demo, saved):
    adaptation = saved["live_adaptation"]
    assert adaptation["loss_after"] < adaptation["loss_before"]
    assert adaptation["steps"] == len(adaptation["log"]) == STEPS
    assert adaptation["response_tokens"] == sum(entry["response_tokens"] for entry in adaptation["log"])
    assert (demo[0]["out"] / "adapter" / "adapter_config.json").exists()


def test_finished_adaptation_is_not_trained_again(demo, monkeypatch):
    settings, report, _ = demo

    def trained_again(*_args, **_kwargs):
        raise AssertionError

    monkeypatch.setattr(live, "adapt", trained_again)
    screen = console()
    again = run_demo(**settings, console=screen)
    assert "not trained again" in screen.file.getvalue()
    assert again["live_adaptation"] == report["live_adaptation"]


def test_interrupted_adaptation_goes_on_from_its_save(demo, tmp_path, monkeypatch):
    settings = demo[0] | {"out": tmp_path, "questions": 1}
    log = tmp_path / "adapter.run" / "log.jsonl"

    def interrupt(_clock, _args, state, _control, **_kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt

    screen = console()
    with monkeypatch.context() as patch:
        patch.setattr(RunClock, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_demo(**settings, console=screen)
    assert "goes on from the last save" in screen.file.getvalue()
    assert not (tmp_path / "adapter").exists()
    saved = _losses(log)[:5]
    report = run_demo(**settings, console=console())
    assert _losses(log)[:5] == saved
    steps = [entry["step"] for entry in report["live_adaptation"]["log"]]
    assert steps == list(range(1, STEPS + 1))


def test_more_minutes_go_on_with_what_fewer_left(demo, tmp_path, monkeypatch):
    settings = demo[0] | {"out": shutil.copytree(demo[0]["out"], tmp_path / "out"), "questions": 1, "minutes": 6.0}
    patched = live.live_options
    monkeypatch.setattr(live, "live_options", lambda *asked: replace(patched(*asked), learning_rate=1e-5))
    with pytest.raises(FastDLLMError, match=r"other settings \(learning_rate\)"):
        run_demo(**settings, console=console())
    monkeypatch.setattr(live, "live_options", patched)
    before = _losses(settings["out"] / "adapter.run" / "log.jsonl")
    report = run_demo(**settings, console=console())
    assert _losses(settings["out"] / "adapter.run" / "log.jsonl") == before
    assert report["live_adaptation"]["options"]["max_minutes"] == 6


def test_minutes_end_the_live_adaptation():
    assert live_options("a base", 0.5).max_minutes == 0.5
    assert live_options("a base", 0.5).schedule == "constant"


def test_without_adaptation_nothing_is_trained(demo, tmp_path):
    settings = demo[0] | {"out": tmp_path / "deep" / "out", "questions": 1, "adapt": False}
    report = run_demo(**settings, console=console())
    assert report["live_adaptation"] is None
    assert sorted(path.name for path in settings["out"].iterdir()) == ["report.html", "report.json"]
    Page((settings["out"] / "report.html").read_text())


def test_bad_settings_are_refused_before_any_work(demo):
    for wrong, message in (
        ({"questions": 0}, "questions=0"),
        ({"minutes": 0.0}, "minutes=0"),
        ({"model": demo[0]["base"]}, "autoregressive"),
    ):
        with pytest.raises(FastDLLMError, match=message):
            run_demo(**demo[0] | wrong, console=console())


def test_screen_shows_every_question_and_the_totals(demo, saved):
    printed = demo[2]
    assert printed.count("✗") + printed.count("✓") >= 2 * QUESTIONS
    assert f"{saved['speedup']:.2f}x" in printed
    assert f"{saved['tokens_per_forward']['diffusion']:.2f}" in printed


def test_page_is_well_formed_and_self_contained(demo):
    page = Page((demo[0]["out"] / "report.html").read_text())
    assert page.external == []
    assert page.scripts == 1


def test_picture_has_one_box_per_new_token(demo, saved):
    page = Page((demo[0]["out"] / "report.html").read_text())
    for figure, question in zip(page.figures, saved["questions"], strict=True):
        assert figure == {mode: question[mode]["new_tokens"] for mode in ("ar", "diffusion")}


def test_page_escapes_what_models_and_questions_say(saved):
    hostile = "<script>alert('x')</script>\"&"
    report = json.loads(json.dumps(saved))
    report["model"] = hostile
    question = report["questions"][0]
    question["question"] = hostile
    for mode in ("ar", "diffusion"):
        question[mode]["text"] = question[mode]["last_line"] = hostile
        question[mode]["tokens"][0] = hostile
    text = render_html(report)
    assert "<script>alert" not in text
    page = Page(text)
    assert page.scripts == 1
    assert hostile in page.text


def test_blocks_of_the_picture_are_cut_at_absolute_positions():
    answer = {"tokens": list("abcdefgh"), "reveal_steps": [0, 2, 1, 1, 3, 4, 4, 5], "confidences": [0.5] * 8}
    answer |= {"forwards": 6, "new_tokens": 8}
    picture = reveal_picture({"prompt_length": 6, "diffusion": answer, "ar": answer}, 4)
    assert [len(block["boxes"]) for block in picture["blocks"]] == [2, 4, 2]
    assert [(block["first"], block["last"]) for block in picture["blocks"]] == [(4, 7), (8, 11), (12, 15)]
    assert [block["prompt"] for block in picture["blocks"]] == [2, 0, 0]
    assert [bar["count"] for bar in picture["bars"]] == [1, 2, 1, 1, 2, 1]


def test_tokens_of_one_forward_share_a_colour_and_forwards_differ():
    colours = [colour_of(step, 12)[0] for step in range(12)]
    assert len(set(colours)) == 12
    assert colour_of(0, 1)[0] == colours[0]


def test_chart_stays_inside_its_frame():
    log = [{"step": i, "loss": 7.0 / i, "elapsed_s": 4.0 * i} for i in range(1, 30)]
    chart = loss_chart({"log": log, "loss_before": 7.3, "loss_after": 0.4})
    for point in chart["line"].split():
        x, y = map(float, point.split(","))
        assert chart["left"] <= x <= chart["right"]
        assert 0 <= y <= chart["bottom"]
    assert [point["label"] for point in chart["held_out"]] == ["7.30", "0.40"]
    assert loss_chart({"log": [], "loss_before": 7.3, "loss_after": 7.3}) is None


def test_totals_count_tokens_and_forwards_and_take_medians():
    def pair(ar_seconds, seconds):
        ar = compare.Answer("Answer: 1", True, 8, 8, ar_seconds, [], [], [])
        return compare.Pair(None, 0, ar, compare.Answer("Answer: 2", False, 8, 2, seconds, [], [], []))

    totals = compare.totals([pair(1.0, 0.5), pair(2.0, 0.5), pair(4.0, 4.0)])
    assert totals["accuracy"] == {"ar": 1.0, "diffusion": 0.0}
    assert totals["tokens_per_forward"] == {"ar": 1.0, "diffusion": 4.0}
    assert totals["tokens_per_s"] == {"ar": 4.0, "diffusion": 16.0}
    assert totals["speedup"] == 4.0
