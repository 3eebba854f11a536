"""`BlockDiffusionTrainer`: transformers' Trainer with our loss, our evaluation and more in its log."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from fast_dllm.checkpoint.quiet import quiet
from fast_dllm.config import ContextAttention
from fast_dllm.gated_lora import gated_token
from fast_dllm.masks import CLEAN, NOWHERE, Tokens, dense_mask
from fast_dllm.model.forward import head_logits, hidden_states
from fast_dllm.objective import select, token_losses
from fast_dllm.training.attention import NAME as IN_PIECES
from fast_dllm.training.attention import supports_pieces, training_mask
from fast_dllm.training.callbacks import RunClock
from fast_dllm.training.clean_context import CleanContext
from fast_dllm.training.evaluation import NOT_FOR_THE_MODEL, Evaluation
from fast_dllm.training.recompute import recomputes
from fast_dllm.training.schedule import IGNORED
from fast_dllm.training.sharding import decodable
from fast_dllm.training.tally import Tally, read


class _TrainingForward:
    """The training forward, mixed into the model's class.

    It is the model's `forward`, so DDP and FSDP see one call of the module they wrap, and the LM head runs while
    its weights are gathered.
    """

    context_attention: ContextAttention

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        tokens: Tensor,
        read: Tensor,
        targets: Tensor,
        is_ar: Tensor,
        **_: Any,
    ) -> Tensor:
        """Loss of each scored token.

        Args:
            input_ids: int64 [B, T], `objective.Streams` and so on for the others.
            position_ids: int64 [B, T].
            tokens: int64 [4, B, T], the fields of `masks.Tokens`.
            read: int64 [N, 2].
            targets: int64 [N].
            is_ar: bool [N]; unused here, weighed by the trainer.
            **_: arguments that peft passes along, all None.

        Returns:
            float32 [N].
        """
        model = cast(PreTrainedModel, self)
        fields = Tokens(*tokens)
        # Recomputed layers get no cache from transformers, so with those it is one forward.
        if gated_token(model) is None or recomputes(model):
            hidden = self._hidden(input_ids, position_ids, fields)
        else:
            hidden, read = self._noisy_hidden(input_ids, position_ids, fields, read)
        return token_losses(hidden[read[:, 0], read[:, 1]], targets, lambda h: head_logits(model, h))

    def _hidden(
        self, input_ids: Tensor, position_ids: Tensor, tokens: Tokens, context: CleanContext | None = None
    ) -> Tensor:
        """Hidden states [B, T, H] over tokens that see each other, and the context's where there is one."""
        model, attention = cast(PreTrainedModel, self), self.context_attention
        keys = tokens if context is None else context.with_keys(tokens)
        if model.config._attn_implementation == IN_PIECES:
            mask = training_mask(tokens, attention, model.config, keys=keys)
            return hidden_states(model, input_ids, position_ids, None, context, training_mask=mask)
        return hidden_states(model, input_ids, position_ids, dense_mask(tokens, attention, keys=keys), context)

    def _noisy_hidden(
        self, input_ids: Tensor, position_ids: Tensor, tokens: Tokens, read: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Hidden states of the noisy tokens alone, and where they are read: [B, Tn, H], int64 [N, 2].

        Where an adapter acts at masks only, no gradient flows through clean tokens: they are run first, keeping K/V and
        nothing for a backward.
        """
        noisy = tokens.stream != CLEAN
        clean = ~noisy & (tokens.document != NOWHERE)
        context = CleanContext() if clean.any() else None
        if context is not None:
            with torch.no_grad():
                self._hidden(*select(clean, input_ids, position_ids, tokens), context)
        hidden = self._hidden(*select(noisy, input_ids, position_ids, tokens), context)
        row, column = read.unbind(1)
        return hidden, torch.stack([row, (noisy.cumsum(1) - 1)[row, column]], dim=1)


def with_training_forward(model: PreTrainedModel, context_attention: ContextAttention) -> PreTrainedModel:
    """Give a loaded model the training forward; `without_training_forward` takes it back."""
    base = type(model)
    # The name stays the architecture's: save_pretrained writes it into config.json.
    model.__class__ = type(base.__name__, (_TrainingForward, base), {"__module__": base.__module__})
    cast(Any, model).context_attention = context_attention
    if supports_pieces(model):
        model.set_attn_implementation(IN_PIECES)
    return model


def without_training_forward(model: PreTrainedModel) -> PreTrainedModel:
    """Restore the architecture's own forward, and its attention; a model without the training forward stays."""
    if isinstance(model, _TrainingForward):
        model.__class__ = type(model).__mro__[2]
    if model.config._attn_implementation == IN_PIECES:
        model.set_attn_implementation("sdpa")
    return model


class BlockDiffusionTrainer(Trainer):  # type: ignore[misc]
    """Block-diffusion (and autoregressive) loss for transformers' Trainer.

    The loss is a mean over the response tokens of the global batch: accumulation and data parallelism do not
    change it (arXiv 2509.26328, section 3).
    """

    def __init__(
        self,
        *args: Any,
        block_size: int,
        ar_weight: float = 0.0,
        hidden_share: float = 1.0,
        clock: RunClock,
        evaluation: Evaluation | None = None,
        complete: Callable[[Path], None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the trainer.

        Args:
            *args: of transformers.Trainer.
            block_size: D, for the logs.
            ar_weight: weight of the AR loss beside the diffusion loss.
            hidden_share: of the response tokens, how many the views hide on average; 0 trains the AR loss alone.
            clock: counts tokens and time for the logs.
            evaluation: what `evaluate` measures.
            complete: makes a directory of saved weights a checkpoint that can be loaded.
            **kwargs: of transformers.Trainer.
        """
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # our loss is already a mean over the accumulated batch
        self._clock = clock
        self._tally = Tally(block_size)
        self._evaluation = evaluation
        self._complete = complete
        # The loss is (diffusion sum + a * AR sum) / hidden tokens; of n response tokens hidden_share * n are hidden.
        # With a = ar_weight * hidden_share that is diffusion mean + ar_weight * AR mean, however much is hidden.
        self._ar_weight = ar_weight * hidden_share if hidden_share else 1.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Weighted sum of the token losses over the number of tokens in the global batch."""
        inputs = dict(inputs)
        labels, hidden_share, place, response_tokens = (inputs.pop(name) for name in NOT_FOR_THE_MODEL)
        losses = model(**inputs)
        is_ar = inputs["is_ar"]
        self._tally.add(losses, is_ar, hidden_share, place, response_tokens)
        weights = torch.where(is_ar, self._ar_weight, 1.0)
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        # Where nothing is hidden there is nothing to learn: a loss of 0, not 0 / 0.
        loss = (losses * weights).sum() / torch.as_tensor(count).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients; the count is already global
        return (loss, {"losses": losses}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights, and what makes them a checkpoint; FSDP's parts of them are none."""
        with quiet():  # else every save of a whole model shows a bar of its shards
            super().save_model(output_dir, _internal_call)
        directory = Path(output_dir or str(self.args.output_dir))
        is_whole = any((directory / name).exists() for name in ("config.json", "adapter_config.json"))
        if self._complete is not None and self.args.should_save and is_whole:
            self._complete(directory)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure what the trainer was given to measure, and log it; the training's clock stands still meanwhile."""
        if self._evaluation is None:
            return {}
        with self._clock.paused():
            metrics = {"eval_loss": self._evaluation.loss(self.model, self.args.device)}
            with decodable(self.model):
                metrics |= {f"eval_{name}": value for name, value in self._evaluation.answers(self.model).items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Complete the log line before it is kept: a resumed run reads its clock from there."""
        tokens = 0
        if "loss" in logs:
            means, tokens = read(self.accelerator.reduce(self._tally.take(), reduction="sum"))
            logs |= means
        self._clock.stamp(logs, tokens, self.state)
        super().log(logs, start_time)
