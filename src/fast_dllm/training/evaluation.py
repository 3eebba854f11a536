"""What is measured on held-out samples before, during and after training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fast_dllm.config import DecodingConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import Packed
from fast_dllm.generation import generate_batch
from fast_dllm.model.hf import HFBackbone
from fast_dllm.training.schedule import StreamCollator

_PROBE_TOKENS = 128
_THRESHOLD = 0.9


@dataclass(frozen=True)
class ProbeItem:
    """A prompt to decode while the model is trained.

    Attributes:
        prompt_ids: token ids.
        is_right: tells from the answer's ids whether it is right; None where nobody knows.
    """

    prompt_ids: Sequence[int]
    is_right: Callable[[list[int]], bool] | None = None


def probe_from(samples: Sequence[Sample], count: int) -> list[ProbeItem]:
    """The prompts of some samples, without a verdict on their answers."""
    prompts = [sample.input_ids[: sample.loss_mask.index(True)] for sample in samples if any(sample.loss_mask)]
    return [ProbeItem(prompt) for prompt in prompts if prompt][:count]


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss, and a few answers.

    Attributes:
        rows: held out.
        collator: of the training.
        batch_size: rows in a forward.
        bfloat16: run in bfloat16 autocast.
        probe: prompts to decode; those without room for an answer are left out.
        stop_token_ids: end an answer.
        max_length: longest sequence of the model, in tokens.
    """

    rows: Sequence[Packed]
    collator: StreamCollator
    batch_size: int
    bfloat16: bool
    probe: Sequence[ProbeItem] = ()
    stop_token_ids: Sequence[int] = field(default_factory=tuple)
    max_length: int | None = None

    def loss(self, model: Any, device: torch.device) -> float:
        """Mean loss of the objective in nats per response token, with the same noise every time."""
        # Of the diffusion objective alone, so that runs with and without an AR loss compare.
        own = self.collator
        collator = replace(own, seed=own.seed + 1, with_ar=not own.with_diffusion)
        losses = []
        with _evaluating(model), torch.no_grad():
            for start in range(0, len(self.rows), self.batch_size):
                batch = collator(list(enumerate(self.rows))[start : start + self.batch_size])
                inputs = {key: value.to(device) for key, value in batch.items() if key not in NOT_FOR_THE_MODEL}
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bfloat16):
                    losses.append(model(**inputs))
        return round(float(torch.cat(losses).mean()), 4)

    def answers(self, model: Any) -> dict[str, float]:
        """Tokens per forward at threshold 0.9, and the share of right answers where somebody knows.

        Args:
            model: with all its weights, wrapped by peft or not; or a sharded one inside `sharding.decodable`.
        """
        most = None if self.max_length is None else self.max_length - _PROBE_TOKENS
        probe = [item for item in self.probe if most is None or len(item.prompt_ids) <= most]
        if not probe:
            return {}
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self.collator.config
        block = config.block_size if self.collator.with_diffusion else 1
        decoding = DecodingConfig(max_new_tokens=_PROBE_TOKENS, threshold=_THRESHOLD, block_size=block)
        prompts = [item.prompt_ids for item in probe]
        # Adapters of a bfloat16 base are float32: only autocast multiplies the two.
        mixed = base.dtype == torch.bfloat16
        with _evaluating(model), torch.autocast(base.device.type, torch.bfloat16, enabled=mixed):
            backbone = HFBackbone(base, config.context_attention, self.max_length)
            backbone.draft_budget = None  # what a row drafts is not to hang on how many are asked at once
            result = generate_batch(backbone, config, prompts, decoding, self.stop_token_ids)
        measured = {"tokens_per_forward": round(result.total.tokens_per_forward, 3)}
        verdicts = [
            item.is_right(answer)
            for item, answer in zip(probe, result.answers, strict=True)
            if item.is_right is not None
        ]
        return measured | ({"right": round(sum(verdicts) / len(verdicts), 3)} if verdicts else {})


NOT_FOR_THE_MODEL = ("labels", "hidden_share", "place", "response_tokens")
"""What `StreamCollator` gives besides the arguments of the training forward."""


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
