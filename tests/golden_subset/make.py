"""A small random checkpoint with the reference decoder's answers and logits; run it to record them anew.

python tests/golden_subset/make.py
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SUBSET = Path(__file__).resolve().parent
MASK, STOPS = 63, (5, 9)

MODELS = (
    {"block_size": 8, "context_attention": "block", "token_shift": True},
    {"block_size": 32, "context_attention": "causal", "token_shift": True},
    {"block_size": 8, "context_attention": "block", "token_shift": False},
    {"block_size": 8, "context_attention": "full", "token_shift": True},
    {"block_size": 8, "context_attention": "full", "token_shift": False},
    {"block_size": 1, "context_attention": "causal", "token_shift": True},
)
DECODINGS = (
    {"policy": "threshold", "threshold": 0.5},
    {"policy": "factor", "factor": 2.0, "confidence": "margin"},
    {"policy": "fixed", "tokens_per_step": 3, "confidence": "entropy", "temperature": 1.0, "top_k": 10, "seed": 1},
    {"policy": "threshold", "threshold": 0.5, "temperature": 0.5, "top_p": 0.75, "seed": 2},
)


def recorded_cases():
    """The recorded answers."""
    return json.loads((SUBSET / "cases.json").read_text())


def recorded_logits():
    """Ids, and their logits under each attention."""
    return load_file(SUBSET / "logits.safetensors")


def _checkpoint():
    from fast_dllm.config import BlockDiffusionConfig
    from tiny import tiny_model

    model = tiny_model("qwen3", vocab_size=64, tie_word_embeddings=False)
    with torch.no_grad():
        # Confidences from 0.01 to 1, so that a step reveals several tokens.
        model.get_output_embeddings().weight.mul_(7)
    config = BlockDiffusionConfig(mask_token_id=MASK, block_size=8)
    model.config.block_diffusion = config.to_dict()
    model.save_pretrained(SUBSET)
    (SUBSET / "generation_config.json").unlink()
    return model.double(), config


def _prompt(seed, length):
    return torch.randint(0, MASK, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def _cases(model, config):
    from fast_dllm.config import DecodingConfig
    from fast_dllm.decoding.reference import hf_logits, reference_generate

    for m, changes in enumerate(MODELS):
        adapted = replace(config, **changes)
        for d, settings in enumerate(DECODINGS):
            length = (3, 8, 21, 32)[(m + d) % 4]
            prompt = _prompt(10 * m + d, length)
            stops = STOPS if d % 2 else ()
            decoding = DecodingConfig(**settings, max_new_tokens=40, stop_token_ids=stops)
            logits_of = hf_logits(model, adapted.context_attention, adapted.block_size)
            yield {
                "id": f"{changes['context_attention']}-{changes['block_size']}-shift{int(adapted.token_shift)}-{d}",
                "model": changes,
                "decoding": {**settings, "max_new_tokens": 40, "verify": False},
                "stop_token_ids": stops,
                "prompt": prompt,
                "answer": reference_generate(logits_of, prompt, adapted, decoding),
            }


def main():
    """Write the checkpoint, the answers and the logits."""
    from fast_dllm.decoding.reference import hf_logits

    model, config = _checkpoint()
    cases = [json.dumps(case) for case in _cases(model, config)]
    (SUBSET / "cases.json").write_text("[\n" + ",\n".join(cases) + "\n]\n")
    ids = torch.tensor(_prompt(99, 40))
    logits = {
        attention: hf_logits(model, attention, config.block_size)(ids[None], len(ids)).float()
        for attention in ("block", "causal", "full")
    }
    save_file({"ids": ids, **logits}, SUBSET / "logits.safetensors")


if __name__ == "__main__":
    sys.path.insert(0, str(SUBSET.parent))
    main()
