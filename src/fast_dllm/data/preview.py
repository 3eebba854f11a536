"""A sample as a reader can see it: its tokens' text, with what is learned and where the blocks begin."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fast_dllm.data.chat import Sample

_INCOMPLETE = "\ufffd"


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or several that are one character.

    Attributes:
        text: special tokens are written out.
        is_learned: whether there is loss on it (on the first of several).
        begins_block: whether a block begins with it, or inside it; never the first block.
    """

    text: str
    is_learned: bool
    begins_block: bool


def pieces_of(tokenizer: Any, sample: Sample, block_size: int) -> list[Piece]:
    """A sample, piece by piece.

    Args:
        tokenizer: the one it was made with.
        sample: what to show.
        block_size: D.
    """
    pieces, start = [], 0
    for text, end in _texts(tokenizer, sample.input_ids):
        begins_block = any(position and position % block_size == 0 for position in range(start, end))
        pieces.append(Piece(text, sample.loss_mask[start], begins_block))
        start = end
    return pieces


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int]]:
    """(text, index behind its last token) of each piece."""
    texts: list[tuple[str, int]] = []
    context = start = 0
    for end in range(1, len(ids) + 1):
        # A SentencePiece tokenizer writes a token differently at the beginning of a text: the piece before goes along.
        before, now = (
            tokenizer.decode(ids[context:index], clean_up_tokenization_spaces=False) for index in (start, end)
        )
        if now.endswith(_INCOMPLETE) and end < len(ids):
            continue
        texts.append((now[len(before) :], end))
        context, start = start, end
    return texts
