"""Every variant is asked in block diffusion, those too whose model could verify."""

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench import ablation
from fast_dllm.data.tasks import held_out_items
from tiny import save_tiny


def test_a_causal_model_is_asked_without_verification(tmp_path, monkeypatch):
    lm = BlockDiffusionLM.from_pretrained(save_tiny(tmp_path / "causal", adapted=True, context_attention="causal"))
    asked, answers = [], lm.answers

    def note(prompts, decoding):
        asked.append(decoding)
        return answers(prompts, decoding)

    monkeypatch.setattr(lm, "answers", note)
    right, tokens_per_forward = ablation._ask(lm, held_out_items(["chain_sum"], 1, seed=0))
    assert [decoding.verifies(lm.config) for decoding in asked] == [False, False]
    assert 0 <= right <= 1 < 1 + tokens_per_forward
