import json

import pytest

from fast_dllm.training import adapt as adapt_module

FAST = ("--batch-size", 2, "--max-length", 64, "--block-size", 8, "--lora-rank", 2, "--eval-samples", 2, "--steps", 1)


@pytest.fixture
def more(chats, tmp_path):
    """20 more conversations, and two rows that are none."""
    path = tmp_path / "more.jsonl"
    lines = chats.read_text().replace("add", "sum").splitlines()[:20]
    path.write_text("\n".join([*lines, "{broken", '{"messages": []}']))
    return path


@pytest.mark.parametrize("workers", [0, 1])
def test_several_sources_are_read_and_their_bad_rows_skipped(run, plain, chats, more, tmp_path, workers):
    command = ("adapt", "--model", plain, "--data", chats, "--data", more, "--out", tmp_path / "adapted", *FAST)
    command = (*command, "--data-workers", workers)
    outcome = run(*command)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {more}:21: not JSON")
    outcome = run(*command, "--skip-bad-rows")
    assert outcome.code == 0, outcome.err
    assert "samples        59, 1 held out; bad rows skipped: 2" in outcome.out


def test_weights_draw_a_small_source_more_often(run, plain, chats, tmp_path):
    small = tmp_path / "small.jsonl"
    small.write_text(chats.read_text().splitlines()[0])
    data = ("--data", f"{chats}:1", "--data", f"{small}:1")
    outcome = run("adapt", "--model", plain, *data, "--out", tmp_path / "adapted", *FAST)
    assert outcome.code == 0, outcome.err
    samples = int(outcome.out.split()[1].rstrip(","))
    assert 60 < samples < 110  # 39 of the one, as many of the other


def test_a_recipe_may_list_its_sources(run, plain, chats, more, tmp_path):
    recipe = tmp_path / "recipe.json"
    sources = [str(chats), {"source": str(more)}]
    recipe.write_text(json.dumps({"model": str(plain), "data": sources, "skip_bad_rows": True}))
    outcome = run("adapt", "--recipe", recipe, "--out", tmp_path / "adapted", *FAST)
    assert outcome.code == 0, outcome.err
    assert "samples        59, 1 held out; bad rows skipped: 2" in outcome.out


def test_plain_text_is_split_not_cut(run, plain, tmp_path):
    text = tmp_path / "story.txt"
    text.write_text("once upon a time there was a tiger. " * 20)
    outcome = run("adapt", "--model", plain, "--data", text, "--out", tmp_path / "adapted", *FAST)
    assert outcome.code == 0, outcome.err
    # 720 characters and the end: windows of 64 that overlap by one.
    assert "samples        12, 0 held out\n" in outcome.out


@pytest.fixture
def trained(monkeypatch):
    """What runs are given: (samples, held-out samples, probe) of each, epochs of a stream read once."""
    given, train = [], adapt_module.adapt

    def noted(source, samples, *args, **kwargs):
        first = list(samples(0)) if callable(samples) else samples
        given.append((first, kwargs["held_out"], kwargs["probe"]))
        return train(source, samples, *args, **kwargs)

    monkeypatch.setattr(adapt_module, "adapt", noted)
    return given


TASKS = ("--task", "chain_sum,leg_counting", "--task-items", 20)
LONG = (*FAST, "--max-length", 256)


def log(out):
    return [json.loads(line) for line in (out.parent / f"{out.name}.run" / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "stream"])
def test_tasks_and_data_are_trained_side_by_side(run, plain, chats, tmp_path, trained, stream):
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "adapted"
    command = ("adapt", "--model", plain, "--data", chats, *TASKS, "--out", out, *LONG, *stream, "--eval-samples", 6)
    outcome = run(*command)
    assert outcome.code == 0, outcome.err
    [(samples, held_out, probe)] = trained
    assert len(samples) + len(held_out) == (60 if stream else 62)
    # In memory: a third of 6 are tasks' fresh items, and a twentieth of 40; of a stream a twentieth of 60.
    assert len(held_out) == (3 if stream else 4)
    assert [item.is_right is not None for item in probe] == [True] * 4
    assert all(0 <= line["eval_right"] <= 1 for line in log(out) if "eval_loss" in line)


def test_a_recipe_may_name_tasks_beside_data(run, plain, chats, tmp_path, trained):
    pytest.importorskip("reasoning_gym")
    recipe = tmp_path / "recipe.json"
    values = {"model": str(plain), "data": str(chats), "tasks": ["chain_sum"], "task_items": 10}
    recipe.write_text(json.dumps(values))
    outcome = run("adapt", "--recipe", recipe, "--out", tmp_path / "adapted", *LONG)
    assert outcome.code == 0, outcome.err
    # Of 2 held-out samples a fifth is no whole task item, and four fifths are one row.
    assert "samples        49, 1 held out" in outcome.out
    assert len(trained[0][0]) == 49


def test_data_of_the_command_line_replaces_data_and_tasks_of_the_recipe(run, plain, chats, more, tmp_path, trained):
    pytest.importorskip("reasoning_gym")
    recipe = tmp_path / "recipe.json"
    values = {"model": str(plain), "data": str(more), "tasks": ["chain_sum"], "task_items": 10}
    recipe.write_text(json.dumps(values))
    common = ("adapt", "--recipe", recipe, *LONG)
    for name, flags, counts in (
        ("data", ("--data", chats), (38, 2)),
        ("tasks", ("--task", "leg_counting", "--task-items", 7), (7, 2)),
    ):
        outcome = run(*common, "--out", tmp_path / name, *flags)
        assert outcome.code == 0, outcome.err
        samples, held_out, _ = trained.pop()
        assert (len(samples), len(held_out)) == counts


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_is_read_while_it_is_trained(run, plain, chats, more, tmp_path, workers):
    out = tmp_path / "adapted"
    data = ("--data", chats, "--data", more, "--skip-bad-rows", "--stream", "--shuffle-buffer", 8)
    data = (*data, "--data-workers", workers)
    outcome = run("adapt", "--model", plain, *data, "--out", out, *FAST, "--steps", 40, "--eval-samples", 3)
    assert outcome.code == 0, outcome.err
    assert "samples        3 held out, the others are read as they are trained" in outcome.out
    assert "samples read   57, 3 held out; bad rows skipped: 2" in outcome.out
    assert "steps          40 of 40" in outcome.out
    settings = json.loads((out.parent / "adapted.run" / "options.json").read_text())
    assert (settings["stream"], settings["shuffle_buffer"]) == (True, 8)


def test_a_recipe_may_ask_for_a_stream(run, plain, chats, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{plain}"\ndata = "{chats}"\nstream = true\nshuffle_buffer = 4\n')
    outcome = run("adapt", "--recipe", recipe, "--out", tmp_path / "adapted", *FAST)
    assert outcome.code == 0, outcome.err
    assert "2 held out, the others are read as they are trained" in outcome.out


def test_a_bad_row_of_a_stream_ends_the_run_where_it_is_met(run, plain, more, tmp_path):
    command = ("adapt", "--model", plain, "--data", more, "--out", tmp_path / "adapted", "--stream", *FAST)
    outcome = run(*command, "--shuffle-buffer", 0, "--eval-samples", 0)
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {more}:21: not JSON")
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "adapted").exists()
