"""Samples to rows of tensors: padding to blocks, packing, collating."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fast_dllm.data.chat import Sample
from fast_dllm.errors import FastDLLMError

NO_DOCUMENT = -1


@dataclass(frozen=True)
class Packed:
    """One row of packed documents. L is a multiple of the block size.

    Attributes:
        input_ids: [L] int64.
        loss_mask: [L] bool.
        position_ids: [L] int64, from 0 in each document (0 on row padding).
        document_ids: [L] int32, from 0 in each row; `NO_DOCUMENT` on row padding. Padding inside a document's
            last block belongs to the document.
    """

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor


def pad_to_blocks(sample: Sample, block_size: int, pad_id: int) -> Sample:
    """Pad a sample at its end, without loss, so that no block straddles two samples.

    Args:
        sample: n tokens.
        block_size: D.
        pad_id: the mask token's id.

    Returns:
        The sample with ceil(n / D) * D tokens.
    """
    missing = -len(sample.input_ids) % block_size
    return replace(
        sample,
        input_ids=[*sample.input_ids, *[pad_id] * missing],
        loss_mask=[*sample.loss_mask, *[False] * missing],
    )


def pack(
    samples: Sequence[Sample],
    *,
    length: int,
    block_size: int,
    pad_id: int,
    pad_blocks: bool = True,
    separate: bool = True,
) -> list[Packed]:
    """Pack samples into rows, each sample into the first row that has room.

    Args:
        samples: none empty, none longer than `length`.
        length: most tokens in a row; a multiple of `block_size`.
        block_size: D.
        pad_id: the mask token's id.
        pad_blocks: pad each sample to whole blocks, so that documents start on block borders. False is the
            "naive" ablation: samples follow each other, only the row's end is padded.
        separate: each sample is a document of its own. False makes one of all samples in a row, as the published code
            does: positions run on, and a sample sees those before it.

    Returns:
        Rows of whole blocks, at most `length` long; inside a row, samples keep their order.

    Raises:
        FastDLLMError: for a sample that is empty or too long (naming its index), or a length that is no multiple
            of the block size.
    """
    if length % block_size or length < block_size:
        raise FastDLLMError(f"length={length} is not a multiple of block_size={block_size}; choose one that is")
    for index, sample in enumerate(samples):
        if not sample.input_ids:
            raise FastDLLMError(f"sample {index} is empty; drop it before packing")
        if len(sample.input_ids) > length:
            size = len(sample.input_ids)
            raise FastDLLMError(f"sample {index} has {size} tokens, more than length={length}; truncate it")
    documents = [pad_to_blocks(sample, block_size, pad_id) if pad_blocks else sample for sample in samples]
    rows = first_fit([len(document.input_ids) for document in documents], length)
    chosen = ([documents[index] for index in row] for row in rows)
    return [_to_row(row if separate else [_joined(row)], block_size, pad_id) for row in chosen]


def collate(rows: Sequence[Packed], pad_id: int) -> dict[str, torch.Tensor]:
    """Stack rows, padded at the end to the longest.

    Args:
        rows: B rows of `pack`.
        pad_id: the mask token's id.

    Returns:
        `input_ids`, `loss_mask`, `position_ids`, `document_ids`, each [B, L].
    """
    padding = {"input_ids": pad_id, "loss_mask": False, "position_ids": 0, "document_ids": NO_DOCUMENT}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [getattr(row, name) for row in rows], batch_first=True, padding_value=value
        )
        for name, value in padding.items()
    }


def _joined(samples: Sequence[Sample]) -> Sample:
    ids = [token for sample in samples for token in sample.input_ids]
    return replace(samples[0], input_ids=ids, loss_mask=[loss for sample in samples for loss in sample.loss_mask])


def _to_row(documents: Sequence[Sample], block_size: int, pad_id: int) -> Packed:
    sizes = [len(document.input_ids) for document in documents]
    missing = -sum(sizes) % block_size
    ids = [token for document in documents for token in document.input_ids]
    losses = [loss for document in documents for loss in document.loss_mask]
    positions = [position for size in sizes for position in range(size)]
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    return Packed(
        input_ids=torch.tensor(ids + [pad_id] * missing, dtype=torch.int64),
        loss_mask=torch.tensor(losses + [False] * missing, dtype=torch.bool),
        position_ids=torch.tensor(positions + [0] * missing, dtype=torch.int64),
        document_ids=torch.tensor(numbers + [NO_DOCUMENT] * missing, dtype=torch.int32),
    )


def first_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Put sizes into rows, each into the first row that has room.

    Args:
        sizes: none above `length`.
        length: room of a row.

    Returns:
        The indices of the sizes in each row.
    """
    # A tree over the rows' free room finds the first fit in O(log n).
    leaves = 1
    while leaves < len(sizes):
        leaves *= 2
    free = [length] * (2 * leaves)  # free[1] is the root; a node holds the most room of the rows below it
    rows: list[list[int]] = [[] for _ in sizes]
    for index, size in enumerate(sizes):
        node = 1
        while node < leaves:
            node = 2 * node if free[2 * node] >= size else 2 * node + 1
        rows[node - leaves].append(index)
        free[node] -= size
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [row for row in rows if row]
