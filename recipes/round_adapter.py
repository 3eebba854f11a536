"""Make a trained adapter small: matrices in 8-bit floats, and without the tokenizer, which the base has.

python recipes/round_adapter.py runs/smollm2/longer-cut src/fast_dllm/assets/smollm2-ar
"""

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EIGHT_BITS = torch.float8_e4m3fn


def main(adapter: Path, out: Path) -> None:
    """Write `adapter` to `out`, which is replaced.

    Rounding to 8 bits moves each matrix by 2.6%, and its product with the other one, which is itself a thirtieth of the
    weights beneath, accordingly less.
    """
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, scale = rounded(load_file(adapter / "adapter_model.safetensors"))
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config["lora_alpha"] *= scale
    config["alpha_pattern"] = {layer: alpha * scale for layer, alpha in config["alpha_pattern"].items()}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "block_diffusion.json").write_text((adapter / "block_diffusion.json").read_text())
    card = (adapter / "README.md").read_text().replace(adapter.name, out.name)
    note = "\nRounded to 8-bit floats; its scale is in `lora_alpha`, so it is not one to go on training.\n"
    (out / "README.md").write_text(card + note)


def rounded(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """The weights in 8 bits, and what the adapter's scale is to be multiplied with.

    Small numbers have few bits in these floats, so all are multiplied by a power of two first.
    """
    gains = {kind: _gain(weights, kind) for kind in ("lora_A", "lora_B")}
    kept = {}
    for name, tensor in weights.items():
        gain = next((gain for kind, gain in gains.items() if kind in name), None)
        kept[name] = tensor.to(torch.bfloat16) if gain is None else (tensor.float() * gain).to(EIGHT_BITS)
    return kept, 1 / math.prod(gains.values())


def _gain(weights: dict[str, Tensor], kind: str) -> float:
    largest = max(float(tensor.abs().max()) for name, tensor in weights.items() if kind in name)
    return 2.0 ** math.floor(math.log2(torch.finfo(EIGHT_BITS).max / largest))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
