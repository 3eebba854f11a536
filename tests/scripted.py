"""A backbone that says what it is told to: which token at which position, how surely, and when."""

import math

import torch

from fast_dllm.cache import SlabCache


class ScriptedBackbone:
    """Predicts `script(position, call)` = (token, probability); the rest is spread over the other tokens.

    Attributes:
        batches: every `ForwardBatch` that it ran.
    """

    max_length = None
    draft_budget = None
    likeliest = None
    device = torch.device("cpu")

    def __init__(self, script, *, vocabulary=16, shift=1):
        self.script, self.vocabulary, self.shift = script, vocabulary, shift
        self.batches = []

    def new_cache(self, slots, max_length):
        return SlabCache([], slots, max_length, dtype=torch.float64, device="cpu")

    def forward(self, batch, cache):
        call = len(self.batches)
        self.batches.append(batch)
        logits = torch.empty(len(batch.read), self.vocabulary, dtype=torch.float64)
        for n, place in enumerate(batch.read.tolist()):
            token, probability = self.script(batch.positions[place].item() + self.shift, call)
            logits[n] = math.log((1 - probability) / (self.vocabulary - 1))
            logits[n, token] = math.log(probability)
        return logits
