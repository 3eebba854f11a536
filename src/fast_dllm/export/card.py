"""The README.md that goes with an exported checkpoint."""

from fast_dllm.checkpoint.checkpoint import Checkpoint
from fast_dllm.config import DecodingConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- block-diffusion
- fast-dllm
- custom_code
---

# {title}

A block-diffusion language model: it fills blocks of {block_size} tokens, many tokens per forward pass. \
Made with fast-dllm from: {origin}.

Needs Python 3.11 and transformers 5.10 or later; the decoding code is in this directory.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{title}")
{prompt}
ids = model.generate(inputs["input_ids"], tokenizer=tokenizer, max_new_tokens=512)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

{threshold} Without `trust_remote_code` the directory loads as the plain autoregressive model.

| | |
|---|---|
{table}
"""
_UNVERIFIED = "`threshold=0.9` (the default) trades speed for care: 1.0 reveals one token per forward."
_VERIFIED = (
    "Drafts are verified: the answers are those of autoregressive decoding, and `threshold=0.7` (the default) decides "
    "only how many forwards they take; `verify=False` leaves that out."
)
_CHAT_PROMPT = """\
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
_PLAIN_PROMPT = 'inputs = tokenizer("The sky is blue because", return_tensors="pt")'


def export_card(title: str, checkpoint: Checkpoint) -> str:
    """The card's text: what it is, and the call that decodes from it.

    Args:
        title: name of the directory.
        checkpoint: what is exported.
    """
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    rows = {
        "mask token": config.mask_token_id,
        "token shift": config.token_shift,
        "context attention": config.context_attention,
        "stop tokens": ", ".join(map(str, checkpoint.stop_token_ids)),
        "longest context": checkpoint.max_length,
    }
    chat = getattr(tokenizer, "chat_template", None) is not None
    return _CARD.format(
        title=title,
        block_size=config.block_size,
        origin=checkpoint.origin,
        prompt=_CHAT_PROMPT if chat else _PLAIN_PROMPT,
        threshold=_VERIFIED if DecodingConfig().verifies(config) else _UNVERIFIED,
        table="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )
