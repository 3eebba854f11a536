"""The README.md that goes with a saved checkpoint."""

import json
from collections.abc import Mapping
from typing import Any

from fast_dllm.checkpoint.checkpoint import Checkpoint
from fast_dllm.gated_lora import gated_token

_CARD = """\
---
library_name: {library}
tags:
- block-diffusion
- fast-dllm
---

# {title}

{what} Made with fast-dllm from: {origin}.

    fast-dllm chat {title}

| | |
|---|---|
{table}

## Recipe

{recipe}
"""


def model_card(title: str, checkpoint: Checkpoint, recipe: Mapping[str, Any] | None, *, adapter: bool) -> str:
    """The card's text: what it is, how to run it, how it was made."""
    config = checkpoint.config
    rows = {
        "block size": config.block_size,
        "mask token": config.mask_token_id,
        "token shift": config.token_shift,
        "context attention": config.context_attention,
        "stop tokens": ", ".join(map(str, checkpoint.stop_token_ids)),
        "longest context": checkpoint.max_length,
    }
    what = "A LoRA adapter to be merged into its base." if adapter else "A whole model."
    if gated_token(checkpoint.model) is not None:
        what = "A gated LoRA adapter: it acts at mask tokens alone, beside its base, and is not to be merged."
    told = json.dumps(dict(recipe), indent=2, default=str) if recipe else ""
    return _CARD.format(
        library="peft" if adapter else "transformers",
        title=title,
        what=what,
        origin=checkpoint.origin,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        recipe=f"```json\n{told}\n```" if told else "Not recorded.",
    )
