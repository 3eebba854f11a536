"""Runs one forward for a group of rows: builds its tensors, samples, and applies the policies.

Shape legend: R rows, N candidate tokens, W the most candidates of a row, V vocabulary.
"""

import torch
from torch import Tensor

from fast_dllm.cache import KVCache
from fast_dllm.config import BlockDiffusionConfig, ConfidenceMeasure, DecodingConfig
from fast_dllm.decoding.policy import PolicyParameters, select
from fast_dllm.decoding.sampling import SamplingParameters, greedy, sample
from fast_dllm.engine.request import Row
from fast_dllm.model.backbone import Backbone, ForwardBatch, RowSpan

Revealed = list[tuple[int, int, float]]
"""(position, token, confidence) of each token that a row reveals."""


class Executor:
    """Forwards over the cache."""

    def __init__(self, backbone: Backbone, config: BlockDiffusionConfig) -> None:
        self._backbone = backbone
        self._config = config

    @torch.inference_mode()
    def run(self, rows: list[Row], cache: KVCache) -> list[Revealed]:
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
        if logits.shape[0] == 0:
            return [[] for _ in rows]
        tokens, confidence = self._choose(rows, logits)
        return self._reveal(rows, tokens, confidence)

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
                    slot=row.request.slot or 0,
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
        owners = [row for row in rows for _ in row.forward.candidates]
        kinds: dict[tuple[bool, ConfidenceMeasure], list[int]] = {}
        for candidate, row in enumerate(owners):
            decoding = row.request.decoding
            kinds.setdefault((decoding.temperature > 0, decoding.confidence), []).append(candidate)
        uniform = self._draw(rows)
        tokens = torch.empty(len(owners), dtype=torch.long, device=logits.device)
        confidence = torch.empty(len(owners), dtype=logits.dtype, device=logits.device)
        banned = self._config.mask_token_id
        for (sampled, measure), indices in kinds.items():
            index: slice | Tensor = slice(None) if len(kinds) == 1 else self._tensor(indices)
            if sampled:
                parameters = self._sampling([owners[i].request.decoding for i in indices], uniform[index])
                tokens[index], confidence[index] = sample(logits[index], banned, measure, parameters)
            else:
                tokens[index], confidence[index] = greedy(logits[index], banned, measure)
        return tokens, confidence

    def _draw(self, rows: list[Row]) -> Tensor:
        """One uniform number per candidate, from each row's own generator; greedy rows draw none."""
        draws = [
            torch.rand(len(row.forward.candidates), generator=row.request.generator)
            if row.request.decoding.temperature > 0
            else torch.zeros(len(row.forward.candidates))
            for row in rows
        ]
        return torch.cat(draws).to(self._backbone.device, non_blocking=True)

    def _sampling(self, settings: list[DecodingConfig], uniform: Tensor) -> SamplingParameters:
        return SamplingParameters(
            temperature=self._tensor([s.temperature for s in settings], torch.float32),
            top_k=self._tensor([s.top_k for s in settings]),
            top_p=self._tensor([s.top_p for s in settings], torch.float32),
            uniform=uniform,
        )

    def _reveal(self, rows: list[Row], tokens: Tensor, confidence: Tensor) -> list[Revealed]:
        """Apply each row's policy; the one place where a tick waits for the device."""
        counts = self._tensor([len(row.forward.candidates) for row in rows])
        place = torch.arange(max(len(row.forward.candidates) for row in rows), device=tokens.device)
        masked = place < counts[:, None]
        window = torch.zeros(masked.shape, dtype=confidence.dtype, device=tokens.device)
        window[masked] = confidence
        chosen = select(window, masked, self._policies([row.request.decoding for row in rows], window.dtype))[masked]
        all_tokens, all_confidences, all_chosen = tokens.tolist(), confidence.tolist(), chosen.tolist()
        revealed: list[Revealed] = []
        start = 0
        for row in rows:
            candidates = row.forward.candidates
            found = zip(candidates, all_tokens[start:], all_confidences[start:], all_chosen[start:], strict=False)
            revealed.append([(c, token, conf) for c, token, conf, take in found if take])
            start += len(candidates)
        return revealed

    def _policies(self, settings: list[DecodingConfig], dtype: torch.dtype) -> PolicyParameters:
        return PolicyParameters(
            threshold=self._tensor([[s.threshold if s.policy == "threshold" else torch.inf] for s in settings], dtype),
            at_least=self._tensor([[s.tokens_per_step if s.policy == "fixed" else 1] for s in settings]),
            factor=self._tensor([[s.factor if s.policy == "factor" else 0.0] for s in settings], dtype),
        )
