"""What a training run asks for."""

from dataclasses import dataclass
from typing import Literal

from fast_dllm.config import _FromMapping, _require, _require_choice, _require_int, _require_number

Objective = Literal["diffusion", "ar"]


@dataclass(frozen=True, kw_only=True)
class AdaptOptions(_FromMapping):
    """Settings of `fast-dllm adapt`; saved with the checkpoint as its recipe.

    Attributes:
        objective: "diffusion" adapts to block diffusion; "ar" is the same-data autoregressive fine-tune.
        steps: optimizer updates.
        batch_size: samples (or packs) per forward and device.
        accumulation: forwards per update.
        learning_rate: peak, reached after `warmup_steps`, see `schedule`.
        warmup_steps: linear warm-up, of half the steps at most.
        schedule: after it, "linear" decay to zero or "constant".
        weight_decay: of AdamW.
        max_grad_norm: longer gradients are cut to this norm; 0 cuts none.
        divergence: nats that the mean loss of 20 steps may rise above its lowest before the run is ended; 0 is any.
        max_length: tokens; longer samples are truncated and counted.
        block_size: tokens per block.
        token_shift: the hidden state at i-1 predicts token i.
        context_attention: who sees whom among clean tokens: "block" (the paper's), or "causal".
        complementary: two views with complementary masks (off: one view).
        mask_ratio: share of every block's answer that the first view hides; None draws it for each block, as the paper
            does. Drafts that are verified are looked at once, with every token hidden: give 1 for those.
        pad_to_block: pad each sample with mask tokens to whole blocks (off: samples straddle blocks).
        ar_weight: weight of the autoregressive loss on the clean stream; needs causal context attention. Such models
            verify their drafts against their autoregressive answers, which only this loss trains: give it 0.5, say.
        stream: read the data while it is trained, and again for every epoch, instead of holding all of it.
        shuffle_buffer: of a stream: documents that are held to choose the next one from; 0 keeps their order.
        data_workers: processes that render data beside each training process; 0 renders in it, between the steps.
        pack: pack samples into rows of `max_length`.
        separate_documents: of a pack: positions begin anew with every sample, and no sample sees another (off: as the
            published code, samples of a row read on as one).
        lora_rank: rank of a new LoRA adapter on all linear layers (one that is trained on keeps its own); 0 trains all
            weights.
        lora_alpha: scale of a new adapter; None is twice the rank.
        gated_lora: let the adapter act at mask tokens alone (arXiv 2507.11851); needs causal context attention. The
            autoregressive answers stay bit for bit what they were, and verified drafts give them: only speed is
            trained. It is not merged, so a forward with masks in it takes a little longer.
        base: of the LoRA adapter that is trained on, instead of its own: another LoRA fine-tune of the same model,
            which drafts are to follow.
        lora_base: of the layers under a LoRA adapter: "dense", or "nf4" for 4-bit weights (QLoRA; needs bitsandbytes).
        mask_token: a vocabulary entry to use as mask token; None finds or adds one.
        dtype: of the arithmetic: "bfloat16" (autocast), "float32", or "auto", the faster one of this machine.
        gradient_checkpointing: recompute whole layers in the backward; off, a full fine-tune recomputes what is cheap.
        seed: of weights' initialisation, data order and noise.
        save_every: steps between resumable saves.
        max_minutes: stop after so much training (over all resumptions) even if steps are left; None does not.
        eval_samples: held-out samples whose loss is measured before and after.
        eval_every: steps between measurements on the way; 0 measures before and after only.
        probe_items: held-out prompts that are decoded at each measurement, at threshold 0.9: tokens per forward show
            how parallel the model has become; 0 decodes none.
        report_to: where the log goes besides log.jsonl, by transformers' own callbacks.
    """

    objective: Objective = "diffusion"
    steps: int = 500
    batch_size: int = 8
    accumulation: int = 1
    learning_rate: float = 3e-4
    warmup_steps: int = 20
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    divergence: float = 1.5
    max_length: int = 1024
    block_size: int = 32
    token_shift: bool = True
    context_attention: Literal["block", "causal"] = "block"
    complementary: bool = True
    mask_ratio: float | None = None
    pad_to_block: bool = True
    ar_weight: float = 0.0
    stream: bool = False
    shuffle_buffer: int = 10_000
    data_workers: int = 0
    pack: bool = False
    separate_documents: bool = True
    lora_rank: int = 32
    lora_alpha: int | None = None
    gated_lora: bool = False
    base: str | None = None
    lora_base: Literal["dense", "nf4"] = "dense"
    mask_token: str | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 50
    max_minutes: float | None = None
    eval_samples: int = 32
    eval_every: int = 100
    probe_items: int = 4
    report_to: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self) -> None:
        _require_choice("objective", self.objective, Objective)
        for name in ("steps", "batch_size", "accumulation", "max_length", "block_size", "save_every"):
            _require_int(name, getattr(self, name), 1)
        counts = ("warmup_steps", "lora_rank", "seed", "eval_samples", "eval_every", "probe_items")
        for name in (*counts, "shuffle_buffer", "data_workers"):
            _require_int(name, getattr(self, name), 0)
        _require_number("learning_rate", self.learning_rate, 0.0, 1.0)
        _require_number("weight_decay", self.weight_decay, 0.0, 1.0)
        _require_number("max_grad_norm", self.max_grad_norm, 0.0, 1e9)
        _require_number("divergence", self.divergence, 0.0, 1e9)
        _require_number("ar_weight", self.ar_weight, 0.0, 100.0)
        _require_choice("context_attention", self.context_attention, Literal["block", "causal"])
        _require_choice("dtype", self.dtype, Literal["auto", "bfloat16", "float32"])
        _require_choice("schedule", self.schedule, Literal["linear", "constant"])
        _require_choice("report_to", self.report_to, Literal["none", "tensorboard", "wandb"])
        _require_choice("lora_base", self.lora_base, Literal["dense", "nf4"])
        _require(self.lora_base == "dense" or self.lora_rank > 0, "lora_base='nf4': 4-bit weights need a lora_rank")
        if self.max_minutes is not None:
            _require_number("max_minutes", self.max_minutes, 0.0, 1e6)
        if self.mask_ratio is not None:
            _require_number("mask_ratio", self.mask_ratio, 0.0, 1.0)
            _require(self.mask_ratio > 0, "mask_ratio=0: hides nothing; give a share above 0")
        _require(
            not self.gated_lora or (self.lora_rank > 0 and self.objective == "diffusion" and self.ar_weight == 0),
            "gated_lora=True acts at mask tokens alone: it needs a lora_rank, objective='diffusion' and ar_weight=0",
        )
        _require(
            not self.gated_lora or self.context_attention == "causal",
            "gated_lora=True leaves clean tokens to the model's own weights, which know causal attention alone: it "
            "needs context_attention='causal'",
        )
        if self.lora_alpha is not None:
            _require_int("lora_alpha", self.lora_alpha, 1)
        _require(
            self.ar_weight == 0 or self.context_attention == "causal",
            f"ar_weight={self.ar_weight:g} needs context_attention='causal'",
        )
        _require(
            self.token_shift or (self.objective == "diffusion" and self.ar_weight == 0),
            "token_shift=False: an autoregressive loss (objective='ar', ar_weight above 0) would read the very token "
            "it predicts; leave token_shift on",
        )
        _require(
            self.max_length % self.block_size == 0,
            f"max_length={self.max_length} must be a multiple of block_size={self.block_size}",
        )

    @property
    def loading_dtype(self) -> Literal["bfloat16", "float32"]:
        """Of the base as it is loaded. A frozen one needs no float32 master copy; weights that are trained do."""
        return "bfloat16" if self.lora_rank and self.dtype == "bfloat16" else "float32"

    @property
    def hidden_share(self) -> float:
        """Of the response tokens, how many the noisy views hide on average; 0 where there are no views."""
        if self.objective == "ar":
            return 0.0
        if self.complementary:
            return 1.0  # what one shows the other hides
        return 0.5 if self.mask_ratio is None else self.mask_ratio
