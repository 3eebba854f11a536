"""Procedural reasoning tasks with worked solutions: as many as asked for, seeded, with a verifier.

Questions and answers come from reasoning-gym; the worked solution is derived from an item's metadata. Every
solution is short, regular, and ends in a line `Answer: <answer>`. The tasks are easy on purpose: a model of a
hundred million parameters can learn each from a few thousand examples, so that decoders can be compared on it.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from fast_dllm.data import solutions
from fast_dllm.errors import FastDLLMError

# reasoning-gym seeds item i of a dataset with seed + i: datasets of neighbouring seeds share all items but one.
# So every (seed, split) gets a range of this many item seeds to itself.
_SEED_STRIDE = 10_000_000
_MAX_CONSECUTIVE_REJECTS = 20_000

RESERVED_TEST_ITEMS = 200
"""Test items of seed 0 that no training run on tasks gets to see; measure on these."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its worked solution.

    Attributes:
        task: name in `TASKS`.
        question: what the user says.
        solution: the steps, then a last line `Answer: <answer>`.
        answer: the final answer alone.
    """

    task: str
    question: str
    solution: str
    answer: str

    def messages(self) -> list[dict[str, str]]:
        """The item as a chat: the user's question, the assistant's solution."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.solution},
        ]


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """How a reasoning-gym dataset becomes items.

    Attributes:
        dataset: name of the reasoning-gym dataset.
        settings: its difficulty.
        work: entry -> (question, steps, answer), or None to skip an entry that is too hard for the task.
        normalise: makes two ways of writing the same answer equal.
    """

    dataset: str
    settings: Mapping[str, Any]
    work: Callable[[solutions.Entry], solutions.Worked | None]
    normalise: Callable[[str], str] = field(default=lambda text: text)


def _as_number(text: str) -> str:
    try:
        return str(Decimal(text.replace(",", "").lstrip("+")).normalize())
    except InvalidOperation:
        return text


def _as_list(text: str) -> str:
    return ", ".join(_as_number(part) for part in re.sub(r"[\[\]'\"]", "", text).replace(",", " ").split())


def _as_factors(text: str) -> str:
    return " x ".join(re.findall(r"\d+", text))


def _without_spaces(text: str) -> str:
    return text.replace(" ", "")


def _as_letters(text: str) -> str:
    return re.sub(r"[\s-]", "", text)


TASKS: dict[str, TaskSpec] = {
    "chain_sum": TaskSpec(
        "chain_sum",
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        solutions.chain_sum,
        _as_number,
    ),
    "leg_counting": TaskSpec(
        "leg_counting",
        {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 6},
        solutions.leg_counting,
        _as_number,
    ),
    "number_sorting": TaskSpec(
        "number_sorting",
        {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 99},
        solutions.number_sorting,
        _as_list,
    ),
    "letter_counting": TaskSpec(
        "letter_counting", {"min_words": 1, "max_words": 2}, solutions.letter_counting, _as_number
    ),
    "spell_backward": TaskSpec(
        "spell_backward", {"min_word_len": 3, "max_word_len": 6}, solutions.spell_backward, _as_letters
    ),
    "basic_arithmetic": TaskSpec(
        "basic_arithmetic",
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1, "operators": ["+", "-", "*"]}
        | {"allow_negation": False},
        solutions.basic_arithmetic,
        _as_number,
    ),
    "gcd": TaskSpec(
        "gcd",
        {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 99},
        solutions.greatest_common_divisor,
        _as_number,
    ),
    "products": TaskSpec(
        "products", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, solutions.product, _as_number
    ),
    "prime_factorization": TaskSpec(
        "prime_factorization", {"min_value": 4, "max_value": 9999}, solutions.prime_factors, _as_factors
    ),
    "fraction_simplification": TaskSpec(
        "fraction_simplification",
        {"min_value": 1, "max_value": 30, "min_factor": 2, "max_factor": 12, "styles": ["plain"]},
        solutions.simplified_fraction,
        _without_spaces,
    ),
    "word_sorting": TaskSpec(
        "word_sorting",
        {"min_words": 3, "max_words": 4, "min_word_length": 3, "max_word_length": 8},
        solutions.word_sorting,
        _as_list,
    ),
}


def make_items(tasks: Sequence[str], count: int, *, seed: int, exclude: Collection[str] = ()) -> list[Item]:
    """Items for training.

    Args:
        tasks: names in `TASKS`; item i is of task `tasks[i % len(tasks)]`.
        count: how many items, over all tasks.
        seed: 0 or more; the same seed gives the same items.
        exclude: questions that must not occur.

    Returns:
        `count` items, no question twice.

    Raises:
        FastDLLMError: for an unknown task, when reasoning-gym is missing, or when a task has no more questions.
    """
    return _items(tasks, count, first_seed=2 * seed * _SEED_STRIDE, exclude=exclude)


def held_out_items(tasks: Sequence[str], count: int, *, seed: int, exclude: Collection[str] = ()) -> list[Item]:
    """Items for testing, from item seeds that `make_items` never uses. Small tasks can still repeat a question:
    pass the test questions to `make_items` as `exclude`, or call `train_and_test`.

    Args:
        tasks: as for `make_items`.
        count: as for `make_items`.
        seed: as for `make_items`.
        exclude: as for `make_items`.
    """
    return _items(tasks, count, first_seed=(2 * seed + 1) * _SEED_STRIDE, exclude=exclude)


def train_and_test(
    tasks: Sequence[str], train_count: int, test_count: int, *, seed: int
) -> tuple[list[Item], list[Item]]:
    """Training and test items without a common question.

    Args:
        tasks: as for `make_items`.
        train_count: training items, over all tasks.
        test_count: test items, over all tasks. They depend on `tasks` and `seed` only, not on `train_count`.
        seed: as for `make_items`.

    Returns:
        (training items, test items).
    """
    test = held_out_items(tasks, test_count, seed=seed)
    train = make_items(tasks, train_count, seed=seed, exclude={item.question for item in test})
    return train, test


def is_correct(item: Item, text: str) -> bool:
    """Whether the last `Answer:` line of a reply gives the item's answer, whatever its case, spacing or full stop.

    Args:
        item: the question asked.
        text: the whole reply.
    """
    answers = re.findall(r"answer\s*:[ \t]*([^\n]*)", text, flags=re.IGNORECASE)
    if not answers:
        return False
    normalise = TASKS[item.task].normalise
    return normalise(_plain(answers[-1])) == normalise(_plain(item.answer))


def _plain(answer: str) -> str:
    return " ".join(answer.lower().strip(" \t\r*`").removesuffix(".").split())


def _items(tasks: Sequence[str], count: int, *, first_seed: int, exclude: Collection[str]) -> list[Item]:
    if not tasks:
        raise FastDLLMError(f"no tasks given; choose from {', '.join(TASKS)}")
    for name in tasks:
        if name not in TASKS:
            raise FastDLLMError(f"task {name!r}: unknown; choose from {', '.join(TASKS)}")
    if first_seed < 0:
        raise FastDLLMError("seed is negative; use 0 or more")
    seen = set(exclude)
    streams = {name: _stream(name, first_seed, seen) for name in dict.fromkeys(tasks)}
    return [next(streams[tasks[index % len(tasks)]]) for index in range(count)]


def _stream(name: str, first_seed: int, seen: set[str]) -> Iterator[Item]:
    """Endless new items of one task; `seen` grows by their questions."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise FastDLLMError(
            f"task {name!r}: reasoning-gym is not installed; run pip install '.[demo]' in fast-dllm's directory"
        ) from error

    spec = TASKS[name]
    entries = reasoning_gym.create_dataset(spec.dataset, seed=first_seed, size=_SEED_STRIDE, **spec.settings)
    rejects = 0
    for index in range(_SEED_STRIDE):
        worked = spec.work(entries[index])
        if worked is None or worked[0] in seen:
            rejects += 1
            if rejects > _MAX_CONSECUTIVE_REJECTS:
                break
            continue
        rejects = 0
        question, steps, answer = worked
        seen.add(question)
        yield Item(name, question, "\n".join([*steps, f"Answer: {answer}"]), answer)
    raise FastDLLMError(f"task {name!r}: no new questions left; ask for fewer items or add another task")
