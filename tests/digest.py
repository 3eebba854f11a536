"""A backbone whose every prediction depends on all K/V that it may look at, exactly and cheaply.

Two "layers" of integers: a key is the token's id, a value digests the keys that its position saw. A prediction
digests the values that its position sees. So a key or value that is missing, stale, another slot's or seen by
mistake changes the tokens, and since float64 holds the integers exactly, nothing else does.
"""

import torch

from fast_dllm.cache import LayerShape, SlabCache

MODULUS = 7919


class DigestBackbone:
    max_length = None
    draft_budget = None
    likeliest = None
    device = torch.device("cpu")

    def __init__(self, attention="block", *, vocabulary=16):
        self.attention, self.vocabulary = attention, vocabulary
        self.calls = 0
        self.fail = False

    def new_cache(self, slots, max_length):
        return SlabCache([LayerShape(1, 1, 1)], slots, max_length, dtype=torch.float64, device="cpu")

    def forward(self, batch, cache):
        if self.fail:
            raise MemoryError("out of memory")
        digests, offset = [], 0
        for row in batch.rows:
            ids = batch.input_ids[offset : offset + row.length].double()
            digests.append(self._digest(row, ids, self._seen(row), cache))
            offset += row.length
        self.calls += 1
        return self._logits(torch.cat(digests)[batch.read])

    def _seen(self, row):
        query, key = torch.arange(row.start, row.end)[:, None], torch.arange(row.visible_end)
        if self.attention == "block":
            seen = key // row.block_size <= query // row.block_size
        elif self.attention == "causal":
            seen = key <= query
        else:
            seen = key >= 0
        return ((seen & (key < row.noisy_from)) | (query >= row.noisy_from)).double()

    def _digest(self, row, ids, seen, cache):
        keys, values = cache.keys[0][row.slot, 0, :, 0], cache.values[0][row.slot, 0, :, 0]
        place = torch.arange(row.visible_end, dtype=torch.float64)
        keys[row.start : row.end] = ids + 1
        values[row.start : row.end] = (seen @ (keys[: row.visible_end] * (31 * place + 17))) % MODULUS
        return (seen @ (values[: row.visible_end] * (13 * place + 5)) + 3 * place[row.start : row.end]) % MODULUS

    def _logits(self, digests):
        tokens, sureness = (digests // 5) % (self.vocabulary - 1), (digests % 100 + 1) / 102
        rest = ((1 - sureness) / (self.vocabulary - 1)).log()
        logits = rest[:, None].repeat(1, self.vocabulary)
        return logits.scatter(1, tokens.long()[:, None], sureness.log()[:, None])
