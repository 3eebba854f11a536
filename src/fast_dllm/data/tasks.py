"""Procedural reasoning tasks with worked solutions: as many as asked for, seeded, with a verifier.

Questions and answers come from reasoning-gym; the worked solution is derived from an item's metadata. Every
solution is short, regular, and ends in a line `Answer: <answer>`. The tasks are easy on purpose: a model of a
hundred million parameters can learn each from a few thousand examples, so that decoders can be compared on it.
"""

import ast
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

from fast_dllm.errors import FastDLLMError

# reasoning-gym seeds item i of a dataset with seed + i: datasets of neighbouring seeds share all items but one.
# So every (seed, split) gets a range of this many item seeds to itself.
_SEED_STRIDE = 10_000_000
_MAX_CONSECUTIVE_REJECTS = 20_000

RESERVED_TEST_ITEMS = 200
"""Test items of seed 0 that no training run on tasks gets to see; measure on these."""

Entry = Mapping[str, Any]


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
    work: Callable[[Entry], tuple[str, list[str], str] | None]
    normalise: Callable[[str], str] = field(default=lambda text: text)


def _chain_sum(entry: Entry) -> tuple[str, list[str], str] | None:
    terms = entry["metadata"]["expression"].split()
    total, steps = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2]):
        after = total + int(term) if sign == "+" else total - int(term)
        if after < 0:
            return None
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return f"What is {' '.join(terms)}?", steps, str(total)


def _leg_counting(entry: Entry) -> tuple[str, list[str], str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    question = entry["question"].strip().splitlines()[-1].removeprefix("Now, ")
    steps, total = [], 0
    for position, (animal, count) in enumerate(entry["metadata"]["animals"].items()):
        legs = count * ANIMALS[animal]
        steps.append(f"{count} {animal}{'s' if count > 1 else ''} x {ANIMALS[animal]} = {legs}")
        if position > 0:
            steps.append(f"{total} + {legs} = {total + legs}")
        total += legs
    return question[0].upper() + question[1:], steps, str(total)


def _number_sorting(entry: Entry) -> tuple[str, list[str], str]:
    numbers = [int(float(number)) for number in entry["metadata"]["original_numbers"]]
    direction = entry["metadata"]["direction"]
    left, taken, steps = list(numbers), [], []
    while left:
        number = min(left) if direction == "ascending" else max(left)
        left.remove(number)
        taken.append(number)
        steps.append(f"take {number}" + (f", left {_commas(left)}" if left else ""))
    return f"Sort these numbers in {direction} order: {_commas(numbers)}", steps, _commas(taken)


def _commas(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _letter_counting(entry: Entry) -> tuple[str, list[str], str] | None:
    metadata = entry["metadata"]
    words = [word.lower() for word in metadata["span"]]
    target, letters = metadata["target_letter"], "".join(words)
    # Most answers would be 1, and "1" a good guess: keep one in five of those.
    is_common = letters.count(target) == 1 and metadata["source_index"] % 5 > 0
    if is_common or not (letters.isalpha() and letters.isascii() and 4 <= len(letters) <= 14):
        return None
    count, steps = 0, []
    for word in words:
        spelled = []
        for letter in word:
            count += letter == target
            spelled.append(f"{letter} ({count})" if letter == target else letter)
        steps.append(" ".join(spelled))
    question = f'How many times does the letter "{target}" appear in "{" ".join(metadata["span"])}"?'
    return question, steps, str(count)


def _spell_backward(entry: Entry) -> tuple[str, list[str], str] | None:
    word = entry["metadata"]["word"]
    if not (word.isalpha() and word.isascii() and word.islower()):
        return None
    question = f"Spell this word backward, letter by letter (example: sun -> n u s): {word}"
    return question, [" ".join(word)], " ".join(reversed(word))


_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[int, int], int]]] = {
    ast.Add: ("+", lambda a, b: a + b),
    ast.Sub: ("-", lambda a, b: a - b),
    ast.Mult: ("*", lambda a, b: a * b),
}


class _TooHardError(Exception):
    """An expression outside what the task keeps."""


def _evaluate(node: ast.expr, steps: list[str]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise _TooHardError
    sign, operate = _OPERATORS[type(node.op)]
    left, right = _evaluate(node.left, steps), _evaluate(node.right, steps)
    value = operate(left, right)
    if not 0 <= value <= 99:
        raise _TooHardError
    steps.append(f"{left} {sign} {right} = {value}")
    return value


def _basic_arithmetic(entry: Entry) -> tuple[str, list[str], str] | None:
    expression = entry["metadata"]["expression"]
    steps: list[str] = []
    try:
        value = _evaluate(ast.parse(expression, mode="eval").body, steps)
    except _TooHardError:
        return None
    shown = expression.replace("( ", "(").replace(" )", ")")
    return f"Calculate {shown}.", steps, str(value)


def _as_number(text: str) -> str:
    try:
        return str(Decimal(text.replace(",", "").lstrip("+")).normalize())
    except InvalidOperation:
        return text


def _as_list(text: str) -> str:
    return ", ".join(_as_number(part) for part in re.sub(r"[\[\]'\"]", "", text).replace(",", " ").split())


def _as_letters(text: str) -> str:
    return re.sub(r"[\s-]", "", text)


TASKS: dict[str, TaskSpec] = {
    "chain_sum": TaskSpec(
        "chain_sum",
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        _chain_sum,
        _as_number,
    ),
    "leg_counting": TaskSpec(
        "leg_counting",
        {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 6},
        _leg_counting,
        _as_number,
    ),
    "number_sorting": TaskSpec(
        "number_sorting",
        {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0, "min_value": 0, "max_value": 99},
        _number_sorting,
        _as_list,
    ),
    "letter_counting": TaskSpec("letter_counting", {"min_words": 1, "max_words": 2}, _letter_counting, _as_number),
    "spell_backward": TaskSpec("spell_backward", {"min_word_len": 3, "max_word_len": 6}, _spell_backward, _as_letters),
    "basic_arithmetic": TaskSpec(
        "basic_arithmetic",
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1, "operators": ["+", "-", "*"]}
        | {"allow_negation": False},
        _basic_arithmetic,
        _as_number,
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
            f"task {name!r}: reasoning-gym is not installed; run pip install 'fast-dllm[demo]'"
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
