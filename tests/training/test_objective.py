"""The three-stream layout gives the numbers of the plain one: each view beside a clean stream of its own."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import collate, pack
from fast_dllm.masks import CLEAN, NOWHERE, Tokens, dense_mask
from fast_dllm.model.forward import head_logits, hidden_states
from fast_dllm.noise import draw_views
from fast_dllm.objective import lay_out, token_losses
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.trainer import with_training_forward
from tiny import ARCHITECTURES, tiny_model

MASK_ID, BLOCK = 63, 8


def config(attention="block", shift=True):
    return BlockDiffusionConfig(mask_token_id=MASK_ID, block_size=BLOCK, context_attention=attention, token_shift=shift)


def losses_of(model, streams, attention):
    hidden = hidden_states(model, streams.input_ids, streams.position_ids, dense_mask(streams.tokens, attention))
    read = hidden[streams.read[:, 0], streams.read[:, 1]]
    return token_losses(read, streams.targets, lambda h: head_logits(model, h), chunk=7)


def two_pass_loss(model, ids, loss_mask, views, cfg):
    """The published way: [noisy | clean] once per view, all logits, labels shifted."""
    rows, length = ids.shape
    total = ids.new_zeros((), dtype=torch.float64)
    index = torch.arange(length).expand(rows, -1)
    for view in views:
        both = torch.cat([ids.masked_fill(view, MASK_ID), ids], dim=1)
        stream = torch.cat([torch.ones_like(index), torch.full_like(index, CLEAN)], dim=1)
        place = index.repeat(1, 2)
        tokens = Tokens(stream, place // BLOCK, place, torch.zeros_like(place))
        hidden = hidden_states(model, both, place, dense_mask(tokens, cfg.context_attention))
        logits = head_logits(model, hidden)[:, :length]
        labels = ids.masked_fill(~view, -100)
        if cfg.token_shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        total = total + torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum"
        )
    return total


def batch(rows=3, blocks=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, MASK_ID, (rows, blocks * BLOCK), generator=generator)
    starts = torch.randint(0, blocks * BLOCK, (rows, 1), generator=generator)
    loss_mask = torch.arange(blocks * BLOCK) >= starts
    return ids, loss_mask, draw_views(loss_mask, BLOCK, generator)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("attention", ["block", "causal"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_three_streams_equal_two_passes(architecture, attention, shift):
    model = tiny_model(architecture, dtype=torch.float64)
    ids, loss_mask, views = batch()
    cfg = config(attention, shift)
    ours = losses_of(model, lay_out(ids, loss_mask, views, cfg), attention).sum()
    ours_gradient = torch.autograd.grad(ours, model.get_input_embeddings().weight)[0]
    plain = two_pass_loss(model, ids, loss_mask, views, cfg)
    plain_gradient = torch.autograd.grad(plain, model.get_input_embeddings().weight)[0]
    # token_losses scores in float32, as training does.
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    torch.testing.assert_close(ours_gradient, plain_gradient, rtol=1e-4, atol=1e-5)


@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 5))
def test_loss_does_not_depend_on_how_the_batch_is_split(seed, rows):
    model = tiny_model("llama", dtype=torch.float64)
    ids, loss_mask, views = batch(rows=rows, seed=seed)
    with torch.no_grad():
        whole = losses_of(model, lay_out(ids, loss_mask, views, config()), "block")
        parts = [
            losses_of(model, lay_out(ids[r : r + 1], loss_mask[r : r + 1], views[:, r : r + 1], config()), "block")
            for r in range(rows)
        ]
    assert whole.sum().item() == pytest.approx(sum(part.sum().item() for part in parts), rel=1e-6, abs=1e-9)
    assert len(whole) == sum(map(len, parts))


@cache
def training_model(attention, gated):
    """A model with the training forward and, where gated, an adapter that is not nothing."""
    model = with_training_forward(tiny_model("qwen2", dtype=torch.float64), attention)
    if not gated:
        return model
    options = AdaptOptions(context_attention="causal", gated_lora=True, mask_ratio=1.0, lora_rank=4, block_size=BLOCK)
    wrapped = wrap_with_lora(model, MASK_ID, options, None).double()
    generator = torch.Generator().manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return wrapped


KINDS = {
    "block context": {"attention": "block"},
    "causal context": {"attention": "causal"},
    "causal with an AR loss": {"attention": "causal", "with_ar": True},
    "AR alone": {"attention": "causal", "with_ar": True, "views": 0},
    "gated": {"attention": "causal", "gated": True},
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_packed_samples_have_the_loss_of_unpacked_ones(kind, lengths, seed):
    attention, with_ar, views = kind["attention"], kind.get("with_ar", False), kind.get("views", 2)
    model = training_model(attention, kind.get("gated", False))
    generator = torch.Generator().manual_seed(seed)
    samples = [
        Sample(
            input_ids=torch.randint(0, MASK_ID, (n,), generator=generator).tolist(),
            loss_mask=[i >= n // 3 for i in range(n)],
        )
        for n in lengths
    ]
    per_sample = [
        draw_views(row.loss_mask, BLOCK, torch.Generator().manual_seed(seed + i))[:views]
        for i, sample in enumerate(samples)
        for row in pack([sample], length=160, block_size=BLOCK, pad_id=MASK_ID)
    ]

    def loss(rows, drawn):
        b = collate(rows, pad_id=MASK_ID)
        streams = lay_out(
            b["input_ids"],
            b["loss_mask"],
            drawn,
            config(attention),
            position_ids=b["position_ids"],
            document_ids=b["document_ids"],
            with_ar=with_ar,
        )
        with torch.no_grad():
            return model(**streams._asdict() | {"tokens": torch.stack(streams.tokens)}).sum().item()

    separate = sum(
        loss(pack([sample], length=160, block_size=BLOCK, pad_id=MASK_ID), drawn[:, None])
        for sample, drawn in zip(samples, per_sample, strict=True)
    )
    (packed,) = pack(samples, length=160, block_size=BLOCK, pad_id=MASK_ID)
    # First-fit puts samples that all fit into one row in their own order.
    together = loss([packed], torch.cat(per_sample, dim=1)[:, None])
    assert together == pytest.approx(separate, rel=1e-6, abs=1e-9)
    assert separate > 0


def test_blocks_without_loss_are_left_out():
    ids = torch.arange(6 * BLOCK)[None]
    loss_mask = torch.zeros_like(ids, dtype=torch.bool)
    loss_mask[0, 3 * BLOCK + 2 : 3 * BLOCK + 5] = True
    views = torch.stack([loss_mask, torch.zeros_like(loss_mask)])
    streams = lay_out(ids, loss_mask, views, config())
    # One noisy block; the clean blocks before it; nothing of view 2, nor of what comes after.
    assert streams.input_ids.shape == (1, BLOCK + 3 * BLOCK)
    assert (streams.tokens.stream == 1).sum() == BLOCK


def test_where_nothing_is_hidden_every_weight_has_a_gradient_of_zero():
    model = tiny_model("llama")
    ids, loss_mask, _ = batch()
    streams = lay_out(ids, loss_mask, torch.zeros_like(loss_mask)[None], config())
    assert streams.targets.numel() == 0
    loss = losses_of(model, streams, "block").sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients)


def test_first_token_of_a_block_is_read_in_the_noisy_block_before():
    ids = torch.arange(3 * BLOCK)[None]
    loss_mask = torch.zeros_like(ids, dtype=torch.bool)
    loss_mask[0, 2 * BLOCK] = True
    streams = lay_out(ids, loss_mask, loss_mask[None], config())
    row, column = streams.read[0].tolist()
    assert streams.position_ids[row, column] == 2 * BLOCK - 1
    assert streams.tokens.stream[row, column] == 1


def test_padding_sees_only_padding_and_no_row_is_blind():
    ids, loss_mask, views = batch(rows=4)
    streams = lay_out(ids, loss_mask, views, config())
    mask = dense_mask(streams.tokens, "block")[:, 0]
    padding = streams.tokens.document == NOWHERE
    assert padding.any()
    assert mask.any(-1).all()
    assert not (mask & (padding[:, :, None] != padding[:, None, :])).any()


def test_ar_loss_on_the_clean_stream_is_the_models_own():
    model = tiny_model("qwen3", dtype=torch.float64)
    ids, loss_mask, views = batch()
    streams = lay_out(ids, loss_mask, views, config("causal"), with_ar=True)
    with torch.no_grad():
        ours = losses_of(model, streams, "causal")[streams.is_ar]
        labels = ids.masked_fill(~loss_mask, -100)
        own = model(input_ids=ids, labels=labels).loss
    assert ours.mean().item() == pytest.approx(own.item(), rel=1e-6)


def test_chunks_do_not_change_losses_or_gradients():
    head = torch.nn.Linear(16, 50)
    hidden = torch.randn(37, 16, requires_grad=True)
    targets = torch.randint(0, 50, (37,))
    results = []
    for chunk in (5, 1000):
        losses = token_losses(hidden, targets, head, chunk=chunk)
        results.append((losses, *torch.autograd.grad(losses.sum(), [hidden, head.weight])))
    for small, large in zip(*results, strict=True):
        torch.testing.assert_close(small, large)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_and_its_gradients_are_those_of_cross_entropy(dtype):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((37, 16), (50, 16)))
    targets, weights = torch.randint(0, 50, (37,), generator=generator), torch.rand(37, generator=generator)
    weights[3] = 0
    found = []
    for chunk in (None, 64, *([15] if dtype == torch.float32 else [])):  # bfloat16 rounds the sum of chunks
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        if chunk is None:
            losses = torch.nn.functional.cross_entropy((h @ w.T).float(), targets, reduction="none")
        else:
            losses = token_losses(h, targets, lambda x, w=w: x @ w.T, chunk=chunk)
        found.append((losses, *torch.autograd.grad((losses * weights).sum(), (h, w))))
    for ours in found[1:]:
        for one, other in zip(ours, found[0], strict=True):
            torch.testing.assert_close(one, other)


def test_logits_that_an_operation_has_kept_are_not_lost_unseen():
    weight = torch.randn(16, 50, requires_grad=True)
    losses = token_losses(torch.randn(5, 16), torch.zeros(5, dtype=torch.long), lambda h: (h @ weight).exp())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


def test_logits_of_the_last_chunk_are_computed_once():
    linear, rows = torch.nn.Linear(16, 50), []

    def head(h):
        rows.append(len(h))
        return linear(h)

    hidden, targets = torch.randn(37, 16, requires_grad=True), torch.randint(0, 50, (37,))
    losses = token_losses(hidden, targets, head, chunk=15)
    assert rows == [15, 15, 7]
    losses.sum().backward()
    assert sorted(rows[3:]) == [15, 15]
