import json


def test_json_tells_what_a_checkpoint_is(run, adapted):
    facts = json.loads(run("info", adapted, "--json").out)
    assert facts["architecture"] == "LlamaForCausalLM"
    assert (facts["layers"], facts["vocabulary"], facts["max_length"]) == (2, 64, 512)
    assert (facts["block_size"], facts["context_attention"], facts["token_shift"]) == (8, "block", True)
    assert facts["verifies_drafts"] is False
    assert facts["mask_token"] == {"id": 54, "text": "|<MASK>|"}
    assert facts["stop_tokens"] == [{"id": 3, "text": "<|im_end|>"}]
    assert facts["dtype"] == "float32"
    assert facts["parameters"] > 10_000
    assert "base" not in facts


def test_text_has_a_line_for_each_fact(run, adapted, plain):
    lines = run("info", adapted).out.splitlines()
    assert len(lines) == len(json.loads(run("info", adapted, "--json").out))
    assert "mask token         |<MASK>| (54)" in lines
    assert "mask token         none" in run("info", plain).out.splitlines()
