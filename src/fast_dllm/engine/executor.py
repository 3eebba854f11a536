"""Runs one forward for a group of rows: builds its tensors, samples, and applies the policies.

Shape legend: N candidate tokens, V vocabulary.
"""

import numpy as np
import torch
from torch import Tensor

from fast_dllm.cache import KVCache
from fast_dllm.config import BlockDiffusionConfig, ConfidenceMeasure, DecodingConfig
from fast_dllm.decoding.forward import Revealed
from fast_dllm.decoding.policy import Floats, PolicyParameters, select
from fast_dllm.decoding.sampling import SamplingParameters, greedy, sample
from fast_dllm.engine.request import Row
from fast_dllm.model.backbone import Backbone, ForwardBatch, RowSpan


class Executor:
    """Forwards over the cache."""

    def __init__(self, backbone: Backbone, config: BlockDiffusionConfig) -> None:
        self._backbone = backbone
        self._config = config

    @torch.inference_mode()
    def run(self, rows: list[Row], cache: KVCache) -> list[list[Revealed]]:
        """One forward.

        Args:
            rows: in order of (query length, slot).
            cache: read and written.

        Returns:
            What each row reveals.
        """
        if not rows:
            return []
        logits = self._backbone.forward(self._batch(rows), cache)
        deciding = [row for row in rows if row.forward.candidates]
        if not deciding:
            return [[] for _ in rows]
        tokens, confidence = self._choose(deciding, logits)
        revealed = iter(self._reveal(deciding, tokens, confidence))
        return [next(revealed) if row.forward.candidates else [] for row in rows]

    def _tensor(self, values: object, dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self._backbone.device, non_blocking=True)

    def _batch(self, rows: list[Row]) -> ForwardBatch:
        # A model without a mask token decodes blocks of one, of which no forward holds a mask.
        mask_id = self._config.mask_token_id or 0
        shift = 1 if self._config.token_shift else 0
        spans: list[RowSpan] = []
        ids: list[int] = []
        read: list[int] = []
        for row in rows:
            state, forward = row.request.state, row.forward
            # Under token shift a token is predicted at the position before it, else where it stands.
            base = len(ids) - forward.start - shift
            read += [base + candidate for candidate in forward.candidates]
            ids += [mask_id if token is None else token for token in state.ids[forward.start : forward.end]]
            spans.append(
                RowSpan(
                    slot=row.slot,
                    start=forward.start,
                    end=forward.end,
                    visible_end=forward.visible_end,
                    noisy_from=forward.noisy_from,
                    block_size=state.block_size,
                )
            )
        return ForwardBatch.build(spans, ids, read, self._backbone.device)

    def _choose(self, rows: list[Row], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Token and confidence of every candidate, both [N]."""
        kinds: dict[tuple[bool, ConfidenceMeasure], tuple[list[Row], list[int]]] = {}
        place = 0
        for row in rows:
            decoding, count = row.request.decoding, len(row.forward.candidates)
            members, places = kinds.setdefault((decoding.temperature > 0, decoding.confidence), ([], []))
            members.append(row)
            places += range(place, place + count)
            place += count
        if len(kinds) == 1:
            ((sampled, measure),) = kinds
            return self._choose_alike(rows, logits, sampled, measure)
        tokens = torch.empty(place, dtype=torch.long, device=logits.device)
        confidence = torch.empty(place, dtype=logits.dtype, device=logits.device)
        for (sampled, measure), (members, places) in kinds.items():
            index = self._tensor(places)
            tokens[index], confidence[index] = self._choose_alike(members, logits[index], sampled, measure)
        return tokens, confidence

    def _choose_alike(
        self, rows: list[Row], logits: Tensor, sampled: bool, measure: ConfidenceMeasure
    ) -> tuple[Tensor, Tensor]:
        """The same for rows that are all sampled, or all greedy, and share a measure."""
        banned = self._config.mask_token_id
        if sampled:
            return sample(logits, banned, measure, self._sampling(rows))
        if measure == "probability" and self._backbone.likeliest is not None:
            return self._backbone.likeliest(logits, banned)
        return greedy(logits, banned, measure)

    def _sampling(self, rows: list[Row]) -> SamplingParameters:
        settings = [row.request.decoding for row in rows for _ in row.forward.candidates]
        draws = [row.request.draw(position) for row in rows for position in row.forward.candidates]
        return SamplingParameters(
            temperature=self._tensor([s.temperature for s in settings], torch.float32),
            top_k=self._tensor([s.top_k for s in settings]),
            top_p=self._tensor([s.top_p for s in settings], torch.float32),
            uniform=self._tensor(draws, torch.float32),
        )

    def _reveal(self, rows: list[Row], tokens: Tensor, confidence: Tensor) -> list[list[Revealed]]:
        """Apply each row's policy; the one place where a tick waits for the device."""
        # One transfer for both: a float32 holds any token id below 2^24.
        together = torch.stack((tokens.to(confidence.dtype), confidence)).cpu()
        chosen = _chosen(rows, together[1].numpy(), self._config)
        all_tokens, all_confidences = together.tolist()
        revealed: list[list[Revealed]] = []
        start = 0
        for row in rows:
            candidates = enumerate(row.forward.candidates, start)
            revealed.append([(c, int(all_tokens[i]), all_confidences[i]) for i, c in candidates if chosen[i]])
            start += len(row.forward.candidates)
        return revealed


def _chosen(rows: list[Row], confidence: Floats, model: BlockDiffusionConfig) -> list[bool]:
    """Which candidates of all rows, end to end, are revealed."""
    counts = [count for row in rows for count in row.forward.decisions]
    if max(counts) == 1:  # the most confident is revealed in any case
        return [True] * len(confidence)
    settings = [row.request.decoding for row in rows for _ in row.forward.decisions]
    masked = np.arange(max(counts)) < np.array(counts)[:, None]
    window = np.zeros(masked.shape, confidence.dtype)
    window[masked] = confidence
    chosen: list[bool] = select(window, masked, _policies(settings, model, confidence.dtype))[masked].tolist()
    return chosen


def _policies(
    settings: list[DecodingConfig], model: BlockDiffusionConfig, dtype: np.dtype[np.floating]
) -> PolicyParameters:
    thresholds = [[s.threshold_on(model) if s.policy == "threshold" else np.inf] for s in settings]
    threshold = np.array(thresholds, dtype)
    if all(s.policy == "threshold" for s in settings):
        return PolicyParameters(threshold)
    return PolicyParameters(
        threshold=threshold,
        at_least=np.array([[s.tokens_per_step if s.policy == "fixed" else 1] for s in settings]),
        factor=np.array([[s.factor if s.policy == "factor" else 0.0] for s in settings], dtype),
    )
