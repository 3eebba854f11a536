"""Every variant is asked in block diffusion, those too whose model could verify."""

from dataclasses import replace

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench import ablation
from fast_dllm.config import BlockDiffusionConfig
from fast_dllm.data.tasks import held_out_items
from fast_dllm.evaluation.procedural import ProceduralBenchmark
from fast_dllm.training.options import AdaptOptions
from fast_dllm.training.rows import lay_rows
from samples import make_samples
from tiny import save_tiny


def test_a_causal_model_is_asked_without_verification(tmp_path, monkeypatch):
    lm = BlockDiffusionLM.from_pretrained(save_tiny(tmp_path / "causal", adapted=True, context_attention="causal"))
    asked, answers = [], lm.answers

    def note(prompts, decoding, **settings):
        asked.append(decoding)
        return answers(prompts, decoding, **settings)

    monkeypatch.setattr(lm, "answers", note)
    questions = ProceduralBenchmark(held_out_items(["chain_sum"], 1, seed=0), max_new_tokens=16)
    right, tokens_per_forward = ablation._ask(lm, questions)
    assert [decoding.verifies(lm.config) for decoding in asked] == [False, False]
    assert asked[0].policy == "sequential"
    assert right == 0  # of random weights
    assert tokens_per_forward > 0


def test_only_the_naive_variant_has_blocks_of_two_samples():
    options = AdaptOptions(max_length=64, block_size=8)
    config = BlockDiffusionConfig(mask_token_id=63, block_size=8)
    straddling = {}
    for variant in ablation.VARIANTS:
        rows = lay_rows(make_samples(), config, replace(options, **variant.changes))
        blocks = [block for row in rows for block in row.document_ids.view(-1, 8)]
        straddling[variant.name] = any(len(block[block >= 0].unique()) > 1 for block in blocks)
    assert straddling == {variant.name: variant.name == "naive token shift" for variant in ablation.VARIANTS}
