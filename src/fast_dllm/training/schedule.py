"""Data order and noise as pure functions of (seed, place in the run), so that a resumed run repeats neither."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.packing import Packed, collate
from fast_dllm.errors import FastDLLMError
from fast_dllm.noise import draw_views
from fast_dllm.objective import lay_out

IGNORED = -100
"""Label that transformers.Trainer does not count."""

WINDOW = 32
"""Updates among which rows of like length are brought together."""

NOTHING_TO_LEARN = "no sample has a response token to learn from; check the data's assistant turns"

_Row = TypeVar("_Row")


def noise_seed(seed: int, place: int) -> int:
    """Seed of one sample's noise. It hangs on the sample's place in the run, not on how batches are cut."""
    return (seed * 0x9E3779B97F4A7C15 + place * 0xBF58476D1CE4E5B9 + 1) % 2**63


def in_order(
    epochs: Callable[[int, random.Random], Iterable[_Row]], length_of: Callable[[_Row], int], batch: int, seed: int
) -> Iterator[_Row]:
    """Rows in the order they are trained, without end.

    Within a window of 32 updates rows of like length share an update, since a forward is padded to its longest row,
    and the updates are shuffled again. How an update is cut into forwards (accumulation, devices) does not change the
    order. One window is held, and no row of the next one is asked for before the last of it is taken.

    Args:
        epochs: the rows of an epoch, counted from 0, in an order of its own, which it may draw from the generator.
        length_of: tokens of a row.
        batch: rows of one update, over all forwards and devices: the global batch.
        seed: of the shuffles.

    Raises:
        FastDLLMError: for an epoch without a row.
    """
    for number in count():
        rng = random.Random(f"{seed}-{number}")
        is_empty = True
        for rows in _updates(iter(epochs(number, rng)), length_of, batch, rng):
            is_empty = False
            yield from rows
        if is_empty:
            raise FastDLLMError(NOTHING_TO_LEARN)


def shuffles(rows: Sequence[_Row]) -> Callable[[int, random.Random], list[_Row]]:
    """Epochs, for `in_order`, of rows that are all there: each is a new shuffle."""
    return lambda _, rng: rng.sample(rows, len(rows))


def run_order(lengths: Sequence[int], total: int, batch: int, seed: int) -> list[int]:
    """Which row is trained at which place of the run: `in_order` of rows that are all there.

    Args:
        lengths: tokens of each row.
        total: places to fill, `steps` times the global batch.
        batch: the global batch.
        seed: of the shuffles.

    Returns:
        `total` indices into `lengths`.
    """
    return list(islice(in_order(shuffles(range(len(lengths))), lengths.__getitem__, batch, seed), total))


def _updates(
    rows: Iterator[_Row], length_of: Callable[[_Row], int], batch: int, rng: random.Random
) -> Iterator[list[_Row]]:
    """The rows of each update of an epoch. An epoch that is smaller than an update is one."""
    is_first = True
    while window := list(islice(rows, WINDOW * batch)):
        if not is_first or len(window) > batch:
            # What does not fill a batch waits for the next epoch, or it would shift all batch borders after it.
            del window[len(window) // batch * batch :]
        is_first = False
        window.sort(key=length_of)
        updates = [window[i : i + batch] for i in range(0, len(window), batch)]
        rng.shuffle(updates)
        window.clear()  # what was trained is not to be held while the next window is read
        while updates:
            yield updates.pop(0)


class RunDataset(Dataset[tuple[int, Packed]]):
    """All rows of a run in the order they are trained; item i is (i, row).

    A row is drawn when it is asked for, and not kept: to go on is cheap, to go back begins again.
    """

    def __init__(self, open_rows: Callable[[], Iterator[Packed]], total: int) -> None:
        """Nothing is drawn yet.

        Args:
            open_rows: begins the run.
            total: its places, `steps` times the global batch.
        """
        self._open, self._total = open_rows, total
        self._rows, self._place = open_rows(), -1
        self._row: Packed | None = None

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, place: int) -> tuple[int, Packed]:
        if place < self._place:
            self._rows, self._place = self._open(), -1
        while self._place < place:
            self._row = next(self._rows)
            self._place += 1
        return place, cast(Packed, self._row)


@dataclass(frozen=True)
class StreamCollator:
    """Rows -> noisy views -> the laid-out streams of one forward.

    Attributes:
        config: of the model being trained.
        complementary: two views or one.
        mask_ratio: of the first view; None draws one for each block.
        with_ar: score the clean stream too.
        with_diffusion: draw noisy views (off: pure AR training).
        seed: of the noise.
    """

    config: BlockDiffusionConfig
    complementary: bool
    with_ar: bool
    with_diffusion: bool
    seed: int
    mask_ratio: float | None = None

    def __call__(self, items: Sequence[tuple[int, Packed]]) -> dict[str, Any]:
        """Lay a batch out.

        Returns:
            Arguments of the training forward; `labels` [1, N + 1] from which Trainer counts the tokens that the mean
            loss is taken over; of each target `hidden_share` [N], how much of the answer in its block is hidden, and
            `place` [N] in its block; and how many `response_tokens` [1] there are, hidden or not.
        """
        block = self.config.block_size
        batch = collate([row for _, row in items], pad_id=self.config.mask_token_id or 0)
        loss_mask = batch["loss_mask"]
        views = loss_mask.new_zeros(0, *loss_mask.shape)
        if self.with_diffusion:
            # Drawn for the row alone: in a longer batch the same generator would give other noise.
            drawn = [self.draw(place, row.loss_mask) for place, row in items]
            views = torch.stack([F.pad(view, (0, loss_mask.shape[1] - view.shape[1])) for view in drawn], dim=1)
        streams = lay_out(
            batch["input_ids"],
            loss_mask,
            views,
            self.config,
            position_ids=batch["position_ids"],
            document_ids=batch["document_ids"],
            with_ar=self.with_ar,
        )
        counted = ~streams.is_ar if self.with_diffusion else streams.is_ar
        labels = torch.full((1, int(counted.sum()) + 1), 0)
        labels[0, 0] = IGNORED  # Trainer leaves the first label of a row out of its count
        laid_out = streams._asdict()
        view, row, place = laid_out.pop("origin").unbind(1)
        return {
            **laid_out,
            "tokens": torch.stack(streams.tokens),
            "labels": labels,
            "hidden_share": _hidden_shares(views, loss_mask, block)[view, row, place // block],
            "place": place % block,
            "response_tokens": loss_mask.sum()[None],
        }

    def draw(self, place: int, loss_mask: Tensor) -> Tensor:
        """The noisy views of one row.

        Args:
            place: of the row in the run.
            loss_mask: bool [L], whole blocks.

        Returns:
            bool [V, L].
        """
        generator = torch.Generator().manual_seed(noise_seed(self.seed, place))
        return draw_views(
            loss_mask,
            self.config.block_size,
            generator,
            complementary=self.complementary,
            mask_ratio=self.mask_ratio,
        )


def _hidden_shares(views: Tensor, loss_mask: Tensor, block: int) -> Tensor:
    """Share of each block's response tokens that each view hides, and the clean stream, which hides none.

    Returns:
        float32 [V + 1, B, L / D].
    """
    streams = torch.cat([views, torch.zeros_like(loss_mask)[None]])
    hidden, all_of_it = (mask.unflatten(-1, (-1, block)).sum(-1) for mask in (streams, loss_mask))
    return torch.div(hidden, all_of_it.clamp(min=1))
