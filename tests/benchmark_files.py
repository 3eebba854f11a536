"""Files in the format of two benchmarks, with a known outcome."""

import json
import re
from pathlib import Path
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig

LIMIT = 20
"""Tokens of an answer under which the outcome is known."""

# Any answer passes the first and the last, none the second. The first needs NLTK's sentence model.
_CHECKS: list[tuple[str, dict[str, Any]]] = [
    ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 50}),
    ("keywords:existence", {"keywords": ["impossible", "unheard of"]}),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 90}),
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k_file(path: Path, lm: BlockDiffusionLM) -> str:
    """Four questions; of the model's AR answers, without examples, the first and the last are as the file says."""
    questions = ["what is 2 and 3?", "how many legs?", "x", "name 3 cats"]
    prompts = [[{"role": "user", "content": f"Question: {question}\nAnswer:"}] for question in questions]
    replies = lm.answers(prompts, DecodingConfig(max_new_tokens=LIMIT, block_size=1, small_block_size=1))
    said = [["nothing", *re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", reply.text)][-1] for reply in replies]
    assert said[0] != "nothing" != said[3]
    answers = [said[0], "77777", "77777", said[3]]
    rows = [{"question": q, "answer": f"so it is\n#### {a}"} for q, a in zip(questions, answers, strict=True)]
    return write_rows(path, rows)


def ifeval_file(path: Path) -> str:
    """Three questions: the first and the last are answered as told, whatever the answer is."""
    rows = [
        {"key": key, "prompt": f"write {key}", "instruction_id_list": [check], "kwargs": [kwargs]}
        for key, (check, kwargs) in enumerate(_CHECKS)
    ]
    return write_rows(path, rows)
