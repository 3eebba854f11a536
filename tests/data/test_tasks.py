import hashlib
import itertools
import json
import math
import re
import sys
import time

import pytest

pytest.importorskip("reasoning_gym")

from fast_dllm.data.tasks import TASKS, Item, held_out_items, is_correct, make_items, train_and_test
from fast_dllm.errors import FastDLLMError

ALL = list(TASKS)


def every_task(count=40):
    return [(name, make_items([name], count, seed=3)) for name in ALL]


@pytest.mark.parametrize(("name", "items"), every_task(), ids=ALL)
def test_a_solution_ends_in_its_answer_and_is_correct(name, items):
    for item in items:
        assert item.solution.splitlines()[-1] == f"Answer: {item.answer}"
        assert is_correct(item, item.solution)


@pytest.mark.parametrize(("name", "items"), every_task(), ids=ALL)
def test_the_worked_answer_is_the_one_of_reasoning_gym(name, items):
    """The solution is derived from the metadata, apart from the generator's own answer."""
    import reasoning_gym

    spec = TASKS[name]
    entries = reasoning_gym.create_dataset(spec.dataset, seed=11, size=200, **spec.settings)
    worked = [(spec.work(entry), entry["answer"]) for entry in entries]
    kept = [(item[2], answer) for item, answer in worked if item is not None]
    assert kept
    assert all(spec.normalise(ours) == spec.normalise(theirs) for ours, theirs in kept)


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "basic_arithmetic"])
def test_every_step_of_arithmetic_holds(name):
    for item in make_items([name], 100, seed=5):
        for step in item.solution.splitlines()[:-1]:
            left, right = step.split(" = ")
            left = re.sub(r"(\d+) [a-z ]+ x (\d+)", r"\1 * \2", left)
            assert re.fullmatch(r"\d+ [-+*] \d+", left), step
            assert eval(left) == int(right), step


def test_euclid_divides_what_the_step_before_left():
    for item in make_items(["gcd"], 100, seed=5):
        steps = [tuple(map(int, re.findall(r"\d+", step))) for step in item.solution.splitlines()[:-1]]
        assert set(steps[0][:2]) == set(map(int, re.findall(r"\d+", item.question)))
        assert all(divided % divisor == left for divided, divisor, left in steps)
        assert all(after[:2] == before[1:] for before, after in itertools.pairwise(steps))
        assert steps[-1][1:] == (int(item.answer), 0)


def test_a_product_is_the_sum_of_its_digits_products():
    for item in make_items(["products"], 100, seed=5):
        for step in item.solution.splitlines()[:-1]:
            left, right = step.split(" = ")
            assert re.fullmatch(r"\d+ [+*] \d+", left), step
            assert eval(left) == int(right), step
        assert eval(item.question.removeprefix("What is ").removesuffix("?")) == int(item.answer)


def test_prime_factors_are_divided_out_one_at_a_time():
    for item in make_items(["prime_factorization"], 100, seed=5):
        *divisions, last, _ = item.solution.splitlines()
        left = int(re.search(r"\d+", item.question).group())
        factors = []
        for step in divisions:
            divided, factor, quotient = map(int, re.fullmatch(r"(\d+) / (\d+) = (\d+)", step).groups())
            assert (divided, factor * quotient) == (left, left)
            factors.append(factor)
            left = quotient
        assert last == f"{left} is prime"
        factors.append(left)
        assert all(all(factor % n for n in range(2, factor)) for factor in factors)
        assert item.answer == " x ".join(map(str, factors))


def test_a_fraction_keeps_its_value_and_ends_in_lowest_terms():
    for item in make_items(["fraction_simplification"], 100, seed=5):
        written = [tuple(map(int, pair)) for pair in re.findall(r"(\d+)/(\d+)", item.question + item.solution)]
        assert all(top * written[0][1] == bottom * written[0][0] for top, bottom in written)
        factors = [int(factor) for factor in re.findall(r"by (\d+)", item.solution)]
        assert [before[0] // after[0] for before, after in itertools.pairwise(written[:-1])] == factors
        assert math.gcd(*written[-1]) == 1


def test_words_are_taken_in_order():
    for item in make_items(["word_sorting"], 50, seed=5):
        words = item.question.split(": ")[1].split(", ")
        taken = re.findall(r"take (\w+)", item.solution)
        assert taken == item.answer.split(", ") == sorted(words, reverse="reverse" in item.question)


def test_items_that_models_were_trained_on_stay_as_they_are():
    """Digests of the items that the model in the box was trained on, and of its other tasks."""
    train, test = train_and_test(["chain_sum", "leg_counting", "number_sorting", "basic_arithmetic"], 2000, 200, seed=0)
    others = make_items(["letter_counting", "spell_backward"], 600, seed=0)
    assert [digest(items) for items in (train, test, others)] == [
        "3bd30cbd26ec31b1",
        "66d5d3c48be16cb1",
        "7d7632019e468366",
    ]


def digest(items):
    rows = json.dumps([[item.task, item.question, item.solution, item.answer] for item in items])
    return hashlib.sha256(rows.encode()).hexdigest()[:16]


def test_sorting_steps_take_one_number_at_a_time():
    for item in make_items(["number_sorting"], 50, seed=5):
        taken = [re.match(r"take (\d+)", step).group(1) for step in item.solution.splitlines()[:-1]]
        assert ", ".join(taken) == item.answer
        assert sorted(taken) == sorted(item.question.split(": ")[1].split(", "))


def test_letters_are_counted_where_they_stand():
    for item in make_items(["letter_counting"], 50, seed=5):
        target = re.search(r'letter "(.)"', item.question).group(1)
        counts = re.findall(rf"{target} \((\d)\)", item.solution)
        assert [int(count) for count in counts] == list(range(1, int(item.answer) + 1))
        assert len(re.findall(rf"\b{target}\b", item.solution.rpartition("\n")[0])) == int(item.answer)


def test_one_answer_does_not_dominate():
    for _, items in every_task(200):
        answers = [item.answer for item in items]
        assert max(answers.count(answer) for answer in set(answers)) < 0.6 * len(answers)


def test_solutions_are_short():
    for item in make_items(ALL, 600, seed=1):
        assert len(item.solution.splitlines()) <= 7
        assert len(item.solution) <= 130
        assert len(item.question) <= 130


def test_the_same_seed_gives_the_same_items_and_another_gives_others():
    assert make_items(ALL, 60, seed=4) == make_items(ALL, 60, seed=4)
    assert make_items(ALL, 60, seed=4) != make_items(ALL, 60, seed=5)


def test_tasks_take_turns():
    assert [item.task for item in make_items(["spell_backward", "chain_sum"], 5, seed=0)] == [
        "spell_backward",
        "chain_sum",
        "spell_backward",
        "chain_sum",
        "spell_backward",
    ]


def test_no_question_is_asked_twice():
    questions = [item.question for item in make_items(ALL, 3000, seed=0)]
    assert len(set(questions)) == len(questions)


def test_excluded_questions_do_not_occur():
    first = {item.question for item in make_items(["chain_sum"], 200, seed=0)}
    again = make_items(["chain_sum"], 200, seed=0, exclude=first)
    assert first.isdisjoint(item.question for item in again)


def test_training_and_test_share_no_question():
    train, test = train_and_test(ALL, 1200, 300, seed=2)
    assert (len(train), len(test)) == (1200, 300)
    assert {item.question for item in train}.isdisjoint(item.question for item in test)


def test_test_items_do_not_depend_on_the_amount_of_training():
    assert train_and_test(ALL, 6, 30, seed=2)[1] == train_and_test(ALL, 60, 30, seed=2)[1]
    assert train_and_test(ALL, 6, 30, seed=2)[1] == held_out_items(ALL, 30, seed=2)


def test_three_thousand_items_take_seconds():
    begin = time.perf_counter()
    make_items(ALL, 3000, seed=9)
    assert time.perf_counter() - begin < 20


def test_an_item_is_a_question_and_its_solution_as_a_chat():
    [item] = make_items(["chain_sum"], 1, seed=0)
    assert item.messages() == [
        {"role": "user", "content": item.question},
        {"role": "assistant", "content": item.solution},
    ]


@pytest.mark.parametrize(
    ("task", "answer", "reply", "right"),
    [
        ("chain_sum", "12", "Answer: 12", True),
        ("chain_sum", "12", "5 + 7 = 12\nANSWER:  12. ", True),
        ("chain_sum", "12", "Answer: 13\nAnswer: 12", True),
        ("chain_sum", "12", "Answer: 12\nAnswer: 13", False),
        ("chain_sum", "1012", "**Answer: 1,012**", True),
        ("chain_sum", "12", "Answer: 12.0", True),
        ("chain_sum", "12", "Answer: 120", False),
        ("chain_sum", "12", "Answer: ", False),
        ("chain_sum", "12", "12", False),
        ("chain_sum", "12", "", False),
        ("number_sorting", "3, 20", "Answer: ['3', '20']", True),
        ("number_sorting", "3, 20", "Answer: 3,20", True),
        ("number_sorting", "3, 20", "Answer: 20, 3", False),
        ("spell_backward", "n u s", "Answer: nus", True),
        ("spell_backward", "n u s", "Answer: N-U-S", True),
        ("spell_backward", "n u s", "Answer: n s u", False),
        ("prime_factorization", "2 x 2 x 3", "Answer: 2 \u00d7 2 \u00d7 3", True),
        ("prime_factorization", "2 x 2 x 3", "Answer: 2*2*3", True),
        ("prime_factorization", "2 x 2 x 3", "Answer: 2 x 6", False),
        ("fraction_simplification", "2/3", "Answer: 2 / 3", True),
        ("fraction_simplification", "2/3", "Answer: 4/6", False),
        ("word_sorting", "ant, bee", "Answer: Ant, Bee", True),
        ("word_sorting", "ant, bee", "Answer: bee, ant", False),
    ],
)
def test_the_last_answer_line_decides(task, answer, reply, right):
    item = Item(task, "", "", answer)
    assert is_correct(item, reply) is right


@pytest.mark.parametrize(
    ("tasks", "seed", "error"),
    [
        (["chain_sums"], 0, "'chain_sums': unknown; choose from chain_sum"),
        ([], 0, "no tasks"),
        (["chain_sum"], -1, "seed is negative"),
    ],
)
def test_bad_requests_are_named(tasks, seed, error):
    with pytest.raises(FastDLLMError, match=error):
        make_items(tasks, 1, seed=seed)


def test_a_task_that_runs_out_says_so(monkeypatch):
    monkeypatch.setattr("fast_dllm.data.tasks._MAX_CONSECUTIVE_REJECTS", 500)
    monkeypatch.setitem(TASKS["chain_sum"].settings, "max_terms", 2)
    monkeypatch.setitem(TASKS["chain_sum"].settings, "max_digits", 1)
    with pytest.raises(FastDLLMError, match="no new questions left"):
        make_items(["chain_sum"], 1000, seed=0)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(FastDLLMError, match=r"pip install '\.\[demo\]'"):
        make_items(["chain_sum"], 1, seed=0)
