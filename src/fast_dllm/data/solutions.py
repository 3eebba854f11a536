"""Worked solutions, derived from the metadata of reasoning-gym's entries.

A function takes an entry and gives (question, steps, answer), or None for an entry that is too hard for the task.
"""

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
Worked = tuple[str, list[str], str]
"""Question, steps, answer."""


def chain_sum(entry: Entry) -> Worked | None:
    """A running total."""
    terms = entry["metadata"]["expression"].split()
    total, steps = int(terms[0]), []
    for sign, term in zip(terms[1::2], terms[2::2]):
        after = total + int(term) if sign == "+" else total - int(term)
        if after < 0:
            return None
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return f"What is {' '.join(terms)}?", steps, str(total)


def leg_counting(entry: Entry) -> Worked:
    """Legs of each kind of animal, and their total."""
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


def number_sorting(entry: Entry) -> Worked:
    """The numbers, taken out one at a time."""
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


def letter_counting(entry: Entry) -> Worked | None:
    """Every letter in turn, with a count behind those that are looked for."""
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


def spell_backward(entry: Entry) -> Worked | None:
    """The letters in their order, then in the other."""
    word = entry["metadata"]["word"]
    if not (word.isalpha() and word.isascii() and word.islower()):
        return None
    question = f"Spell this word backward, letter by letter (example: sun -> n u s): {word}"
    return question, [" ".join(word)], " ".join(reversed(word))


# Limits of what a small model learns from a few thousand examples.
_MOST_STEPS, _LARGEST_FACTOR = 5, 97

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


def basic_arithmetic(entry: Entry) -> Worked | None:
    """Each operation in the order it is done."""
    expression = entry["metadata"]["expression"]
    steps: list[str] = []
    try:
        value = _evaluate(ast.parse(expression, mode="eval").body, steps)
    except _TooHardError:
        return None
    shown = expression.replace("( ", "(").replace(" )", ")")
    return f"Calculate {shown}.", steps, str(value)


def greatest_common_divisor(entry: Entry) -> Worked | None:
    """Euclid's algorithm."""
    first, second = (int(number) for number in entry["metadata"]["numbers"])
    divided, divisor, steps = max(first, second), min(first, second), []
    while divisor:
        steps.append(f"{divided} mod {divisor} = {divided % divisor}")
        divided, divisor = divisor, divided % divisor
    # Most answers would be 1, and "1" a good guess: keep one in five of those.
    is_common = divided == 1 and entry["metadata"]["source_index"] % 5 > 0
    if is_common or len(steps) > _MOST_STEPS:
        return None
    return f"What is the greatest common divisor of {first} and {second}?", steps, str(divided)


def product(entry: Entry) -> Worked:
    """Digit by digit of the second factor."""
    first, second = entry["metadata"]["expression"].split(" * ")
    places = [int(digit) * 10**place for place, digit in enumerate(reversed(second))]
    total, steps = 0, []
    for part in filter(None, reversed(places)):
        partial = int(first) * part
        steps.append(f"{first} * {part} = {partial}")
        if total:
            steps.append(f"{total} + {partial} = {total + partial}")
        total += partial
    return f"What is {first} * {second}?", steps, str(total)


def prime_factors(entry: Entry) -> Worked | None:
    """Division by the smallest factor, until a prime is left."""
    number, factors = entry["metadata"]["number"], entry["metadata"]["factors"]
    if len(factors) - 1 > _MOST_STEPS or factors[-1] > _LARGEST_FACTOR:
        return None
    left, steps = number, []
    for factor in factors[:-1]:
        steps.append(f"{left} / {factor} = {left // factor}")
        left //= factor
    steps.append(f"{left} is prime")
    return f"What are the prime factors of {number}?", steps, " x ".join(map(str, factors))


def simplified_fraction(entry: Entry) -> Worked | None:
    """Division of both by one common prime factor after another."""
    top, bottom = entry["metadata"]["numerator"], entry["metadata"]["denominator"]
    question, steps, factor = f"Simplify the fraction {top}/{bottom}.", [], 2
    while factor <= min(top, bottom):
        if top % factor or bottom % factor:
            factor += 1
            continue
        top, bottom = top // factor, bottom // factor
        steps.append(f"by {factor}: {top}/{bottom}")
    return (question, steps, f"{top}/{bottom}") if 0 < len(steps) <= _MOST_STEPS else None


def word_sorting(entry: Entry) -> Worked | None:
    """The words, taken out one at a time."""
    words, direction = entry["metadata"]["original_words"], entry["metadata"]["direction"]
    # Capitals come before all small letters in the generator's order, which nobody calls alphabetical.
    if len(set(words)) < len(words) or not all(re.fullmatch("[a-z]+", word) for word in words):
        return None
    left, taken, steps = list(words), [], []
    while left:
        word = min(left) if direction == "ascending" else max(left)
        left.remove(word)
        taken.append(word)
        steps.append(f"take {word}")
    order = "alphabetical" if direction == "ascending" else "reverse alphabetical"
    return f"Sort these words in {order} order: {', '.join(words)}", steps, ", ".join(taken)
