"""Cut a LoRA adapter to fewer numbers, dropping what changes its layers' outputs least on what it was trained on.

python recipes/cut_adapter.py runs/smollm2/longer runs/smollm2/longer-cut --numbers 4e6 --chats runs/chats/own.jsonl

An adapter that was trained over another one (`--beneath`) is cut together with it, to one over the base of both.
"""

import argparse
import json
import random
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fast_dllm.checkpoint import is_gated, load_checkpoint
from fast_dllm.data.build import task_documents
from fast_dllm.evaluation.box import TASKS_OF_THE_BOX

PREFIX = "base_model.model."
AT_ONCE = 2048
"""Positions whose inputs are multiplied at once."""


class Ranks(NamedTuple):
    """An adapter's product in one layer, by how much of the layer's output each rank makes: up @ diag(sizes) @ down.

    Attributes:
        up: [outputs, ranks].
        sizes: root mean square of what each rank adds to the output, largest first.
        down: [ranks, inputs].
    """

    up: Tensor
    sizes: Tensor
    down: Tensor

    @property
    def numbers(self) -> int:
        """What one rank takes."""
        return len(self.up) + self.down.shape[1]


def main(
    adapter: Path, out: Path, numbers: int, samples: list[list[dict[str, str]]], beneath: Path | None = None
) -> None:
    """Write `adapter`, and what it was trained over where that is an adapter too, cut to `numbers` numbers to `out`."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config["rank_pattern"]:
        sys.exit(f"{adapter}: its layers have ranks of their own already; cut the adapter that it was made from")
    weights = load_file(adapter / "adapter_model.safetensors")
    moments = input_moments(adapter, samples)
    added = products(adapter)
    if beneath is not None:
        first = products(beneath)
        added = {
            name: (torch.cat([first[name][0], up], dim=1), torch.cat([first[name][1], down]))
            for name, (up, down) in added.items()
        }
    ranks = {name: by_size(up, down, moments[name.removeprefix(PREFIX)]) for name, (up, down) in added.items()}
    kept = share(ranks, numbers)
    for name, count in kept.items():
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = matrices(ranks[name], count)
    # alpha over r scales the product: all of its scale is in the matrices.
    config["r"] = config["lora_alpha"] = max(kept.values())
    config["rank_pattern"] = config["alpha_pattern"] = {
        name.removeprefix(PREFIX): count for name, count in kept.items() if count < config["r"]
    }
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    note = f"\nCut to {min(kept.values())} to {config['r']} ranks a layer.\n"
    if beneath is not None:
        config["base_model_name_or_path"] = set_base(out / "block_diffusion.json", beneath)
        note += f"\nOf two adapters: this recipe's was trained over {beneath.name}, and is one with it here.\n"
    card = (adapter / "README.md").read_text().replace(adapter.name, out.name)
    (out / "README.md").write_text(card + note)
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    lost = sum(float((ranks[name].sizes[count:] ** 2).sum()) for name, count in kept.items())
    whole = sum(float((rank.sizes**2).sum()) for rank in ranks.values())
    print(f"ranks {min(kept.values())} to {config['r']}; {(lost / whole) ** 0.5:.1%} of what the adapter adds is gone")


def products(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """What an adapter adds to each layer, as up [outputs, ranks], scaled, and down [ranks, inputs]."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    added = {}
    for name in [name.removesuffix(".lora_A.weight") for name in weights if name.endswith(".lora_A.weight")]:
        down, up = (weights[f"{name}.lora_{part}.weight"].float() for part in "AB")
        alpha = config["alpha_pattern"].get(name.removeprefix(PREFIX), config["lora_alpha"])
        added[name] = (up * (alpha / len(down)), down)
    return added


def set_base(record: Path, beneath: Path) -> str:
    """Give an adapter the base of the adapter beneath it; returns the base's name."""
    ours, under = (json.loads(path.read_text()) for path in (record, beneath / record.name))
    ours |= {key: under[key] for key in ("base", "base_fingerprint", "mask_token_added")}
    record.write_text(json.dumps(ours, indent=2) + "\n")
    return str(under["base"])


@torch.no_grad()
def input_moments(adapter: Path, samples: list[list[dict[str, str]]]) -> dict[str, Tensor]:
    """Mean products of the inputs of each adapted layer, where the adapter acts.

    Returns:
        [inputs, inputs] by the layer's name.
    """
    checkpoint = load_checkpoint(adapter, dtype="float32")
    model: Any = checkpoint.model.eval()
    moments: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = defaultdict(list)
    acts = torch.ones(0, dtype=torch.bool)  # of the sample under way

    def add(name: str) -> None:
        # A few inputs are thousands of times as large as the others: in float32 the small ones would be lost.
        x = torch.cat(seen.pop(name)).double()
        moments[name] = moments.get(name, torch.zeros(())) + x.T @ x

    def see(name: str, x: Tensor) -> None:
        seen[name].append(x[0, acts])
        if sum(map(len, seen[name])) >= AT_ONCE:
            add(name)

    for name, module in model.named_modules():
        if hasattr(module, "in_features") and ".layers." in name and not re.search(r"\.(lora_|base_layer)", name):
            module.register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs[0]))
    positions = 0
    mask = checkpoint.config.mask_token_id if is_gated(adapter) else None
    for ids, acts in rows(checkpoint, samples, mask):
        model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
        positions += int(acts.sum())
    for name in list(seen):
        add(name)
    return {name.removeprefix(PREFIX): total / positions for name, total in moments.items()}


def rows(checkpoint: Any, samples: list[list[dict[str, str]]], mask: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids of each sample, for a gated adapter with a block of masks behind a part of it, and where it acts."""
    dice = random.Random(0)
    for sample in samples:
        ids = torch.tensor(checkpoint.tokenizer.apply_chat_template(sample, return_dict=True)["input_ids"])[:320]
        if mask is None:
            yield ids, torch.ones_like(ids, dtype=torch.bool)
            continue
        answer = checkpoint.tokenizer.apply_chat_template(sample[:1], add_generation_prompt=True, return_dict=True)
        start = min(len(answer["input_ids"]), len(ids) - 1)
        ids = ids[: dice.randrange(start, len(ids))]
        masked = torch.cat([ids, ids.new_full((checkpoint.config.block_size,), mask)])
        yield masked, masked == mask


def by_size(up: Tensor, down: Tensor, moment: Tensor) -> Ranks:
    """The product's ranks, each as large as what it adds: the singular values behind inputs of this moment."""
    # A little of everything: inputs that no sample had must not be free.
    floor = 1e-3 * moment.diagonal().mean() * torch.eye(len(moment))
    root = torch.linalg.cholesky(moment + floor)
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr((down.double() @ root).T)
    u, sizes, v = torch.linalg.svd(upper @ lower.T)
    whitened = v @ right.T
    return Ranks(left @ u, sizes, torch.linalg.solve_triangular(root.T, whitened.T, upper=True).T)


def share(ranks: Mapping[str, Ranks], numbers: int) -> dict[str, int]:
    """How many ranks each layer keeps: the largest for what they take, over all layers, and one of each at least."""
    offers = [(float(size) ** 2 / rank.numbers, name) for name, rank in ranks.items() for size in rank.sizes[1:]]
    kept = dict.fromkeys(ranks, 1)
    left = numbers - sum(rank.numbers for rank in ranks.values())
    for _, name in sorted(offers, reverse=True):
        if ranks[name].numbers <= left:
            kept[name] += 1
            left -= ranks[name].numbers
    return kept


def matrices(ranks: Ranks, count: int) -> tuple[Tensor, Tensor]:
    """LoRA's A and B of the first ranks, mixed, and the largest numbers of the two alike.

    Mixed by a rotation, every rank is about as large: the engine quantises what they make of a position in equal steps.
    """
    roots = ranks.sizes[:count].sqrt()
    noise = torch.randn(count, count, generator=torch.Generator().manual_seed(0), dtype=roots.dtype)
    rotation, _ = torch.linalg.qr(noise)
    a, b = rotation @ (roots[:, None] * ranks.down[:count]), (ranks.up[:, :count] * roots) @ rotation.T
    balance = (a.abs().max() / b.abs().max()).sqrt()
    return (a / balance).float().contiguous(), (b * balance).float().contiguous()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--numbers", type=float, required=True, help="of its matrices, as many bytes in 8-bit floats")
    parser.add_argument("--chats", type=Path, required=True, help="JSONL of conversations")
    parser.add_argument("--beneath", type=Path, help="the adapter that it was trained over")
    given = parser.parse_args()
    tasks = [document.content for document in task_documents(TASKS_OF_THE_BOX, 6_000)[0][:600]]
    chats = [json.loads(line)["messages"] for line in given.chats.read_text().splitlines()[:100]]
    main(given.adapter, given.out, int(given.numbers), tasks + chats, given.beneath)
