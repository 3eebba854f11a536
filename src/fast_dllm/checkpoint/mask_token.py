"""The mask token: found in the vocabulary, or added to it."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fast_dllm.checkpoint.checkpoint import Checkpoint, vocabulary_rows
from fast_dllm.checkpoint.quiet import quiet
from fast_dllm.errors import FastDLLMError

PUBLISHED_MASK_TOKEN = "|<MASK>|"
_KNOWN_NAMES = (PUBLISHED_MASK_TOKEN, "<|mask|>", "<mask>", "[MASK]")


def find_mask_token(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Id of the tokenizer's mask token: the one it declares, else one with a known name; None if there is none."""
    if tokenizer is None:
        return None
    vocabulary = tokenizer.get_vocab()
    for name in (tokenizer.mask_token, *_KNOWN_NAMES):
        if name is not None and name in vocabulary:
            return int(vocabulary[name])
    return None


def add_mask_token(checkpoint: Checkpoint, *, token: str | None = None) -> int:
    """Give a checkpoint a mask token, and make it known to its tokenizer and config.

    One that the checkpoint has is taken as it is. A new one takes a padding row of the embedding where there is one,
    else the embedding grows by a row; its row is the mean of those before it (in the output matrix too, when untied).

    Args:
        checkpoint: changed in place. Its config's `mask_token_id` is set; the other fields stay.
        token: an entry of the vocabulary to use; None finds one or adds `|<MASK>|`.

    Returns:
        The mask token's id.

    Raises:
        FastDLLMError: when there is no tokenizer, or `token` is not in the vocabulary.
    """
    tokenizer = checkpoint.tokenizer
    if token is None and checkpoint.config.mask_token_id is not None:
        return checkpoint.config.mask_token_id
    if tokenizer is None:
        raise FastDLLMError(f"{checkpoint.origin}: no tokenizer to add a mask token to; give mask_token_id instead")
    if token is not None and token not in tokenizer.get_vocab():
        raise FastDLLMError(f"mask token {token!r}: not in the vocabulary; leave it out to have one added")
    mask_id = tokenizer.get_vocab()[token] if token is not None else find_mask_token(tokenizer)
    if mask_id is None:
        tokenizer.add_special_tokens({"mask_token": PUBLISHED_MASK_TOKEN})
        mask_id = int(tokenizer.convert_tokens_to_ids(PUBLISHED_MASK_TOKEN))
        checkpoint.mask_token_added = True
    else:
        tokenizer.add_special_tokens({"mask_token": tokenizer.convert_ids_to_tokens(mask_id)})
        # The tokenizer may know a token that the model has no row for.
        checkpoint.mask_token_added = mask_id >= vocabulary_rows(checkpoint.model)
    if checkpoint.mask_token_added:
        initialise_mask_row(checkpoint.model, mask_id)
    checkpoint.config = replace(checkpoint.config, mask_token_id=mask_id)
    return mask_id


def initialise_mask_row(model: PreTrainedModel, mask_id: int) -> None:
    """Make room for the mask token where there is none, and set its row to the mean of the rows before it."""
    if mask_id >= vocabulary_rows(model):
        with quiet():
            model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for matrix in [embedding] if head is embedding else [embedding, head]:
            matrix[mask_id] = matrix[:mask_id].float().mean(dim=0).to(matrix.dtype)
