"""`ablate`: what padding, complementary masks and the context attention are worth, on a small model and tasks.

The published ablation trains 1.5B parameters and averages nine benchmarks; this one trains what fits here and asks
generated questions, over several seeds, so that the order can be compared and its noise be seen.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.config import DecodingConfig, TaskItems
from fast_dllm.data.build import gather_conversations, render_conversations
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.box import unseen_questions
from fast_dllm.evaluation.outcome import Outcome
from fast_dllm.evaluation.procedural import ProceduralBenchmark
from fast_dllm.spread import spread
from fast_dllm.training.adapt import adapt
from fast_dllm.training.options import AdaptOptions


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Attributes:
        name: in the table.
        changes: fields of `AdaptOptions`.
        published: accuracy in percent of the 1.5B model (arXiv 2509.26328, average of nine columns), if there is one.
    """

    name: str
    changes: Mapping[str, Any]
    published: float | None = None


# Packed, since in a row of its own no sample shares a block with another, padded or not.
VARIANTS = (
    Variant("naive token shift", {"pack": True, "pad_to_block": False, "complementary": False}, 41.3),
    Variant("+ padding to blocks", {"pack": True, "pad_to_block": True, "complementary": False}, 42.2),
    Variant("+ complementary masks", {"pack": True, "pad_to_block": True, "complementary": True}, 45.0),
    Variant("causal context, AR loss beside", {"pack": True, "context_attention": "causal", "ar_weight": 0.5}),
)


@dataclass(frozen=True)
class VariantOutcome:
    """What became of a variant.

    Attributes:
        name: of the variant.
        changes: as there.
        published: as there.
        right: share of right answers of each seed, block diffusion one token per forward as in the published table.
        tokens_per_forward: of each seed, at threshold 0.9, unverified too.
    """

    name: str
    changes: dict[str, Any]
    published: float | None
    right: list[float]
    tokens_per_forward: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with mean, median and quartiles of what was right."""
        found = spread(self.right)
        summary = {"mean": statistics.fmean(self.right), "median": found.median, "spread": [found.low, found.high]}
        return {**asdict(self), **summary}


def ablate(
    model: str,
    tasks: Sequence[str],
    options: AdaptOptions,
    out: Path,
    *,
    seeds: int = 3,
    items: int = 50,
    task_items: int = 2000,
    on_run: Callable[[str, int], None] | None = None,
) -> list[VariantOutcome]:
    """Train every variant with every seed, and ask held-out questions. Runs that are done are not trained again.

    Args:
        model: what `load_checkpoint` takes.
        tasks: names in `data.tasks.TASKS`.
        options: of every run, but for what a variant changes and the seed.
        out: directory of the adapted models.
        seeds: runs of each variant.
        items: questions asked.
        task_items: training items, over all tasks.
        on_run: called with the variant's name and the seed before each run.

    Raises:
        FastDLLMError: as `adapt`.
    """
    base, generated = load_checkpoint(model), TaskItems(tuple(tasks), task_items)
    tokenizer, trained_on = base.tokenizer, (*base.trained_on, generated)
    del base  # every run loads its own
    if tokenizer is None:
        raise FastDLLMError(f"{model}: has no tokenizer, so no question can be asked")
    conversations = gather_conversations(None, tasks, task_items=task_items, held_out=options.eval_samples)
    data = render_conversations(tokenizer, conversations, max_length=options.max_length)
    questions = ProceduralBenchmark(unseen_questions(tasks, items, trained_on))
    # Before any is trained: options that do not go with a variant are not to be refused hours later.
    changed = [replace(options, **variant.changes) for variant in VARIANTS]
    outcomes = []
    for variant, of_variant in zip(VARIANTS, changed, strict=True):
        right, parallel = [], []
        for seed in range(seeds):
            if on_run is not None:
                on_run(variant.name, seed)
            target = out / f"{VARIANTS.index(variant) + 1}-seed-{seed}"
            own = replace(of_variant, seed=seed)
            adapt(model, data.samples, own, target, held_out=data.held_out, generated=generated)
            share, tokens = _ask(BlockDiffusionLM.from_pretrained(target), questions)
            right.append(share)
            parallel.append(tokens)
        outcomes.append(VariantOutcome(variant.name, dict(variant.changes), variant.published, right, parallel))
    return outcomes


def _ask(lm: BlockDiffusionLM, questions: ProceduralBenchmark) -> tuple[float, float]:
    """Share of right answers at one token per forward, and tokens per forward at threshold 0.9."""

    def ask(**settings: Any) -> Outcome:
        # A causal model verifies unless told not to, which would measure its autoregressive half.
        return questions.ask(lm, DecodingConfig(verify=False, **settings), max_batch=32, advance=lambda: None)

    return ask(policy="sequential").accuracy().value, ask(threshold=0.9).total.tokens_per_forward
