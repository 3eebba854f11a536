"""`measure_training`: our training step beside a plain one, in data tokens a second and peak memory.

The plain step is the straightforward one: two views, each as [noisy | clean], one dense mask, logits of every position.
The published code takes the noisy half of the hidden states before the LM head, and uses compiled flex_attention, which
has no backward on a CPU. Both steps train the same random model of a given shape on the same rows with Trainer's AdamW,
and both keep the memory that a step frees. Each measurement has a process of its own, since the peak of a process
cannot be taken back; the contestants take turns.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from fast_dllm.bench.findings import Findings
from fast_dllm.bench.timing import paired_ratios
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.chat import Sample
from fast_dllm.data.packing import Packed, pack
from fast_dllm.errors import FastDLLMError
from fast_dllm.masks import CLEAN, Tokens, dense_mask
from fast_dllm.model.kernels import why_no_kernels
from fast_dllm.training.lora import wrap_with_lora
from fast_dllm.training.memory import keep_freed_memory
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.pieces import PIECE
from fast_dllm.training.recompute import recompute_cheap_operations
from fast_dllm.training.schedule import StreamCollator
from fast_dllm.training.trainer import with_training_forward

# SmolLM2-135M's config.json.
SMOLLM2_135M: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
OURS, PLAIN = "ours", "plain"
_MASK, _BLOCK = 4, 32
_CONFIG = BlockDiffusionConfig(mask_token_id=_MASK, block_size=_BLOCK)


@dataclass(frozen=True)
class Step:
    """What one process measures.

    Attributes:
        contestant: `OURS` or `PLAIN`.
        length: data tokens of the row.
        answer_share: of its tokens, at its end.
        lora_rank: 0 trains all weights.
        steps: updates, the first of which warms up unless it is the only one.
        threads: of the CPU.
        shape: of the model.
    """

    contestant: str
    length: int
    answer_share: float
    lora_rank: int
    steps: int
    threads: int
    shape: dict[str, Any]


def measure_training(
    lengths: Sequence[int],
    *,
    rounds: int,
    lora_rank: int = 0,
    answer_share: float = 1.0,
    steps: int = 5,
    threads: int | None = None,
    shape: dict[str, Any] = SMOLLM2_135M,
    on_call: Callable[[], None] | None = None,
) -> Findings:
    """Race the two steps.

    Args:
        lengths: data tokens of a row, multiples of 32.
        rounds: processes of each contestant and length; they take turns.
        lora_rank: of an adapter; 0 trains all weights.
        answer_share: share of a row that is answer.
        steps: updates of a process. Memory is slow to come by at first: they get faster up to the fourth or fifth.
        threads: of each; None takes torch's number.
        shape: fields of a transformers config.
        on_call: called after each process.

    Returns:
        Records `tokens_per_s`, `peak_bytes`, `speedup` (paired) and `memory_share` (paired) by length.

    Raises:
        FastDLLMError: when a measurement dies, for want of memory say.
    """
    findings = Findings()
    count = torch.get_num_threads() if threads is None else threads
    about: dict[str, Any] = {"dtype": "float32", "lora_rank": lora_rank, "answer_share": answer_share, "threads": count}
    for length in lengths:
        results: dict[str, list[dict[str, Any]]] = {OURS: [], PLAIN: []}
        for number in range(rounds):
            for contestant in (OURS, PLAIN) if number % 2 == 0 else (PLAIN, OURS):
                step = Step(contestant, length, answer_share, lora_rank, steps, count, shape)
                results[contestant].append(_in_process(step))
                if on_call is not None:
                    on_call()
        for contestant, found in results.items():
            for quantity in ("tokens_per_s", "peak_bytes"):
                values, attention = [result[quantity] for result in found], found[0]["attention"]
                findings.add(quantity, values, length=length, contestant=contestant, attention=attention, **about)
        ours, plain = results[OURS], results[PLAIN]
        for quantity, name in (("tokens_per_s", "speedup"), ("peak_bytes", "memory_share")):
            ratios = paired_ratios([result[quantity] for result in ours], [result[quantity] for result in plain])
            findings.add(name, ratios, length=length, **about)
    return findings


def attention_of_ours() -> str:
    """Which attention our step has on this machine, and why."""
    reason = why_no_kernels()
    which = "our own kernel" if reason is None else f"torch's fused kernel, {PIECE} queries at a time ({reason})"
    return (
        f"ours is {which}, over the keys that a few neighbouring queries see: the mask shows about a sixth of all "
        "scores, which the plain step computes, and flex_attention has no backward on a CPU"
    )


def _in_process(step: Step) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, json.dumps(asdict(step))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise FastDLLMError(f"the {step.contestant} step at {step.length} tokens died ({reason})")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_step(step: Step) -> dict[str, Any]:
    """Train in this process.

    Returns:
        `tokens_per_s` of the fastest update; `peak_bytes` of the process, `loss` of the first update, and the name of
        the `attention` (see `training.attention`).
    """
    torch.set_num_threads(step.threads)
    torch.manual_seed(0)
    keep_freed_memory()
    shape = AutoConfig.for_model(**step.shape)
    model: Any = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").train()
    if step.contestant == OURS:
        model = with_training_forward(model, _CONFIG.context_attention)
        if not step.lora_rank:
            recompute_cheap_operations(model)
    if step.lora_rank:
        model = wrap_with_lora(model, _MASK, AdaptOptions(lora_rank=step.lora_rank, dtype="float32"), None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    row, losses, seconds = _row(step), [], []
    loss_of = _our_loss if step.contestant == OURS else _plain_loss
    for _ in range(step.steps):
        start = time.perf_counter()
        loss = loss_of(model, row)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {
        "tokens_per_s": step.length / min(seconds),
        "peak_bytes": _peak_bytes(),
        "loss": losses[0],
        "attention": model.config._attn_implementation,
    }


def _row(step: Step) -> Packed:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(_MASK + 1, step.shape["vocab_size"], (step.length,), generator=generator).tolist()
    first = round(step.length * (1 - step.answer_share))
    sample = Sample(input_ids=ids, loss_mask=[place >= first for place in range(step.length)])
    (row,) = pack([sample], length=step.length, block_size=_BLOCK, pad_id=_MASK)
    return row


def _our_loss(model: PreTrainedModel, row: Packed) -> Tensor:
    collator = StreamCollator(config=_CONFIG, complementary=True, with_ar=False, with_diffusion=True, seed=0)
    batch = collator([(0, row)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "tokens", "read", "targets", "is_ar")}
    losses: Tensor = model(**inputs)
    return losses.mean()


def _plain_loss(model: PreTrainedModel, row: Packed) -> Tensor:
    """Straightforward: 4L positions, logits of all, labels shifted."""
    collator = StreamCollator(config=_CONFIG, complementary=True, with_ar=False, with_diffusion=True, seed=0)
    views = collator.draw(0, row.loss_mask)
    length = len(row.input_ids)
    ids = row.input_ids.expand(2, -1)
    both = torch.cat([ids.masked_fill(views, _MASK), ids], dim=1)
    place = torch.arange(length).repeat(2).expand(2, -1)
    stream = torch.cat([torch.ones_like(ids), torch.full_like(ids, CLEAN)], dim=1)
    mask = dense_mask(Tokens(stream, place // _BLOCK, place, torch.zeros_like(place)), _CONFIG.context_attention)
    output: Any = model(input_ids=both, attention_mask=mask, position_ids=place, use_cache=False)
    logits = output.logits[:, : length - 1]
    labels = ids.masked_fill(~views, -100)[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _peak_bytes() -> int:
    """Most memory this process has held at once."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(run_step(Step(**json.loads(sys.argv[1])))))
