import json

import pytest

FAST = ("--batch-size", 2, "--max-length", 64, "--block-size", 8, "--lora-rank", 2, "--eval-samples", 2, "--steps", 1)


@pytest.fixture
def more(chats, tmp_path):
    """20 more conversations, and two rows that are none."""
    path = tmp_path / "more.jsonl"
    lines = chats.read_text().replace("add", "sum").splitlines()[:20]
    path.write_text("\n".join([*lines, "{broken", '{"messages": []}']))
    return path


def test_several_sources_are_read_and_their_bad_rows_skipped(run, plain, chats, more, tmp_path):
    command = ("adapt", "--model", plain, "--data", chats, "--data", more, "--out", tmp_path / "adapted", *FAST)
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
