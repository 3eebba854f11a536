"""What fewer bits change: the same questions decoded in every dtype, and compared with float32 token by token."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fast_dllm.api import BlockDiffusionLM, make_backbone
from fast_dllm.bench.bench import Bench
from fast_dllm.bench.peaks import emulates_bfloat16
from fast_dllm.bench.setting import Setting, usual_settings
from fast_dllm.bench.throughput import ask
from fast_dllm.config import CacheDtype
from fast_dllm.model.native import NativeBackbone

_REFERENCE = "float32"
_BATCH = 16

Answers = Sequence[list[int]]


@dataclass(frozen=True)
class Agreement:
    """How far answers are those of the reference.

    A first token that differs changes what every later one is conditioned on, so an answer is compared up to and
    including its first difference.

    Attributes:
        same_tokens: share of the positions compared, over all answers, that hold the same token.
        same_answers: share of answers without a difference.
    """

    same_tokens: float
    same_answers: float


def measure_precision(bench: Bench) -> None:
    """Answer the questions in float32 and in every dtype of the run, one at a time and in batches of 16.

    Args:
        bench: gets `precision`: records whose value is the share of right answers, with `standard_error`,
            `same_tokens` and `same_answers` (see `Agreement`), and `same_in_batch`: the share of questions whose
            tokens in a batch are those alone. bfloat16 is measured on torch's kernels beside our own, and our own
            also with the other dtype of the K/V cache (`cache_dtype`).
    """
    for way in usual_settings(_reference(bench), bench.plan.thresholds):
        reference: Answers | None = None
        contestants = list(_contestants(bench))
        with bench.calls(f"precision, {way}", len(contestants)) as advance:
            for dtype, lm in contestants:
                alone = _answers(bench, lm, way, 1)
                reference = alone if reference is None else reference
                _note(bench, dtype, lm, way, alone, reference)
                advance()


def _reference(bench: Bench) -> BlockDiffusionLM:
    if _REFERENCE in bench.models:
        return bench.models[_REFERENCE]
    return BlockDiffusionLM.from_pretrained(bench.options.model, dtype=_REFERENCE, base=bench.options.base)


def _contestants(bench: Bench) -> Iterator[tuple[str, BlockDiffusionLM]]:
    """(dtype, model), the reference first; a model in our own kernels also with other caches and kernels."""
    yield _REFERENCE, _reference(bench)
    for dtype, lm in bench.models.items():
        if dtype == _REFERENCE:
            continue
        yield dtype, lm
        if not isinstance(lm.backbone, NativeBackbone) or not lm.backbone.kernels.startswith("own"):
            continue
        other: CacheDtype = "bfloat16" if lm.backbone.cache_dtype == "int8" else "int8"
        backbone = make_backbone(lm.checkpoint, int8=dtype == "int8", cache_dtype=other)
        yield dtype, BlockDiffusionLM(lm.checkpoint, backbone)
        if dtype == "bfloat16" and emulates_bfloat16():
            bench.findings.skip("precision of torch's kernels in bfloat16", "this CPU emulates bfloat16")
        elif dtype == "bfloat16":
            model, attention = lm.checkpoint.model, lm.config.context_attention
            torch_kernels = NativeBackbone(model, attention, lm.backbone.max_length, kernels="torch")
            yield dtype, BlockDiffusionLM(lm.checkpoint, torch_kernels)


def _answers(bench: Bench, lm: BlockDiffusionLM, way: Setting, batch: int) -> Answers:
    prompts, most = bench.questions.prompts, bench.options.max_new_tokens
    found: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        found += ask(lm, prompts[start : start + batch], way, most).answers
    return found


def _note(bench: Bench, dtype: str, lm: BlockDiffusionLM, way: Setting, alone: Answers, reference: Answers) -> None:
    count = len(alone)
    right = sum(bench.questions.is_right(number, answer) for number, answer in enumerate(alone)) / count
    agreement = agree(alone, reference)
    bench.findings.add(
        "precision",
        [right],
        threshold=way.threshold,
        dtype=dtype,
        accuracy=right,
        standard_error=math.sqrt(right * (1 - right) / count),
        items=count,
        kernels=getattr(lm.backbone, "kernels", type(lm.backbone).__name__),
        cache_dtype=getattr(lm.backbone, "cache_dtype", None),
        same_tokens=agreement.same_tokens,
        same_answers=agreement.same_answers,
        same_in_batch=agree(_answers(bench, lm, way, _BATCH), alone).same_answers,
        in_batch_of=min(_BATCH, count),
        **way.labels(),
    )


def agree(answers: Answers, reference: Answers) -> Agreement:
    """Compare answers to the same questions.

    Args:
        answers: token ids of each, at least one.
        reference: as many.
    """
    compared = same = identical = 0
    for answer, expected in zip(answers, reference, strict=True):
        common = next((i for i, (a, b) in enumerate(zip(answer, expected, strict=False)) if a != b), None)
        if common is None:  # one may still be longer: its next token has no counterpart
            common = min(len(answer), len(expected))
        differs = answer != expected
        compared += common + differs
        same += common
        identical += not differs
    return Agreement(same / compared if compared else 1.0, identical / len(answers))
