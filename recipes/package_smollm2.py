"""Put a trained adapter into the package: weights in bfloat16, and without the tokenizer, which the base has.

python recipes/package_smollm2.py runs/smollm2/block-diffusion
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PACKAGED = Path(__file__).parent.parent / "src" / "fast_dllm" / "assets" / "smollm2"


def main(adapter: Path) -> None:
    """Replace the packaged adapter by `adapter`."""
    PACKAGED.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "block_diffusion.json"):
        shutil.copyfile(adapter / name, PACKAGED / name)
    card = (adapter / "README.md").read_text().replace(adapter.name, PACKAGED.name)
    (PACKAGED / "README.md").write_text(card)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(weights, PACKAGED / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
