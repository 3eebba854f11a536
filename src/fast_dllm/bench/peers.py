"""The same weights elsewhere: transformers' `generate`, and llama.cpp."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.bench.bench import Bench
from fast_dllm.bench.decode import Decoded, decode
from fast_dllm.bench.gguf_file import check_writable, gguf_of, write_f16
from fast_dllm.bench.llamacpp import LlamaCpp, system_info
from fast_dllm.bench.peaks import emulates_bfloat16
from fast_dllm.bench.setting import AR, Setting, can_diffuse, can_go_one_by_one, diffusion
from fast_dllm.bench.throughput import Contestant, ask, fastest_alone, standing
from fast_dllm.bench.timing import WARM_UP, WARM_UP_TOKENS, Timed, paired_ratios
from fast_dllm.checkpoint import load_checkpoint
from fast_dllm.config import DecodingConfig
from fast_dllm.errors import FastDLLMError
from fast_dllm.gated_lora import gated_token
from fast_dllm.spread import spread

_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PeerAnswer:
    """What a peer made of one question.

    Attributes:
        tokens: new tokens.
        answer: token ids, or text where the peer gives that.
        own_rate: tokens a second by the peer's own clock, prompt left out; None where it has none.
    """

    tokens: int
    answer: list[int] | str
    own_rate: float | None = None


Answer = Callable[[list[int], int], PeerAnswer]
Calls = dict[Any, Callable[[int], Decoded | PeerAnswer]]
Rounds = dict[Any, list[Timed[Any]]]


def measure_peers(bench: Bench) -> None:
    """Race our decoders and the peers, one question at a time.

    Args:
        bench: gets `ar_over_transformers`, `diffusion_over_llamacpp`, and the peers' own rates. The throughput
            table at batch 1 names our fastest settings; without it, it is the default way to decode.
    """
    ours = _our_contestants(bench)
    with _peers(bench) as peers:
        if not peers:
            return
        lengths = _answer_lengths(bench)
        calls: Calls = {contestant: partial(_ask_us, bench, contestant) for contestant in ours}
        calls |= {name: partial(_ask_peer, bench, answer, lengths) for name, answer in peers.items()}
        timed = bench.race("peers", calls, bench.plan.peer_items)
    _note(bench, ours, list(peers), timed)


def _our_contestants(bench: Bench) -> list[Contestant]:
    """AR; block diffusion at its fastest, and at its fastest where it is as often right as AR."""
    ours: list[Contestant] = []
    for dtype, lm in bench.models.items():
        if can_go_one_by_one(lm):
            ours.append((dtype, AR))
        if can_diffuse(lm):
            ours += [(dtype, setting) for setting in fastest_alone(bench, dtype) or [diffusion(lm)]]
    return ours


def _answer_lengths(bench: Bench) -> dict[int, int]:
    """New tokens of our AR answers (item numbers as keys), so that every peer makes as many."""
    lm = next(iter(bench.models.values()))
    setting = AR if can_go_one_by_one(lm) else diffusion(lm)
    most = bench.options.max_new_tokens
    prompts = bench.questions.prompts[: bench.plan.peer_items]
    lengths = {number: len(ask(lm, [prompt], setting, most).answers[0]) for number, prompt in enumerate(prompts)}
    return {WARM_UP: min(most, WARM_UP_TOKENS), **lengths}


def _ask_us(bench: Bench, contestant: Contestant, repetition: int) -> Decoded:
    dtype, setting = contestant
    most = bench.options.max_new_tokens
    if repetition == WARM_UP:
        most = min(most, WARM_UP_TOKENS)
    decoding = DecodingConfig(max_new_tokens=most, **setting.decoding())
    return decode(bench.models[dtype], bench.questions.chunk_prompts(repetition, 1), decoding)


def _ask_peer(bench: Bench, answer: Answer, lengths: dict[int, int], repetition: int) -> PeerAnswer:
    return answer(bench.questions.chunk_prompts(repetition, 1)[0], lengths[repetition])


@contextmanager
def _peers(bench: Bench) -> Iterator[dict[str, Answer]]:
    """Every peer that there is; the others are named in the findings."""
    peers: dict[str, Answer] = {}
    with ExitStack() as stack:
        for dtype, lm in bench.models.items():
            if dtype not in _FLOATS:
                bench.findings.skip(f"transformers {dtype}", f"transformers has no {dtype} of its own")
                continue
            theirs = _dtype_of_transformers(dtype)
            if theirs != dtype:
                bench.findings.skip(f"transformers {dtype}", f"{theirs} takes its place: this CPU emulates {dtype}")
            if f"transformers {theirs}" in peers:
                continue
            base = _beneath(lm)
            has_it = base is None and theirs == dtype
            model = lm.checkpoint.model if has_it else load_checkpoint(base or bench.options.model, dtype=theirs).model
            peers[f"transformers {theirs}"] = partial(_transformers_answer, model.to(lm.backbone.device))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fast-dllm-bench-")))
        for name, path_of in _gguf_files(bench, folder).items():
            try:
                server = stack.enter_context(LlamaCpp(path_of(), bench.threads, _longest(bench)))
            except FastDLLMError as error:
                bench.findings.skip(name, error)
                continue
            peers[name] = partial(_llamacpp_answer, server)
        yield peers


def _longest(bench: Bench) -> int:
    prompts = [bench.questions.warm_up, *bench.questions.prompts]
    return max(map(len, prompts)) + bench.options.max_new_tokens


@torch.inference_mode()
def _transformers_answer(model: Any, prompt: list[int], tokens: int) -> PeerAnswer:
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        use_cache=True,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    answer = out[0, len(prompt) :].tolist()
    return PeerAnswer(len(answer), answer)


def _gguf_files(bench: Bench, folder: Path) -> dict[str, Callable[[], Path]]:
    lm = next(iter(bench.models.values()))
    model = bench.options.model
    return {
        "llama.cpp, its own file": partial(gguf_of, model),
        "llama.cpp, these weights in f16": partial(_write_these_weights, bench, lm, folder / "weights-f16.gguf"),
    }


def _write_these_weights(bench: Bench, lm: BlockDiffusionLM, path: Path) -> Path:
    # Refused before the weights are loaded once more, which is done so that they are not rounded twice.
    check_writable(lm.checkpoint.model.config, lm.tokenizer)
    write_f16(load_checkpoint(_beneath(lm) or bench.options.model, dtype="float32").model, lm.tokenizer, path)
    return path


def _beneath(lm: BlockDiffusionLM) -> str | None:
    """The model beneath a gated adapter, which gives the same answers: the adapter would cost peers for nothing."""
    return None if gated_token(lm.checkpoint.model) is None else lm.checkpoint.base


def _llamacpp_answer(server: LlamaCpp, prompt: list[int], tokens: int) -> PeerAnswer:
    reply = server.complete(prompt, tokens)
    return PeerAnswer(reply.tokens, reply.text, reply.tokens_per_s)


@dataclass(frozen=True)
class _Score:
    """How a contestant or peer did; rates in tokens a second, by repetition.

    Attributes:
        rates: by wall time, prompts included.
        decoding: prompts left out; empty where that is not known.
        accuracy: share of right answers.
        new_tokens: over all repetitions.
    """

    rates: list[float]
    decoding: list[float]
    accuracy: float
    new_tokens: int


def _note(bench: Bench, ours: list[Contestant], peers: list[str], timed: Rounds) -> None:
    scores = {peer: _peer_score(bench, timed[peer]) for peer in peers}
    for peer, score in scores.items():
        _note_peer(bench, peer, score)
    for dtype, setting in ours:
        own = _own_score(bench, timed[dtype, setting])
        for peer, score in scores.items():
            quantity = _ratio_name(setting, dtype, peer)
            if quantity is None:
                continue
            about: dict[str, Any] = {
                "threshold": setting.threshold,
                "dtype": dtype,
                "accuracy": own.accuracy,
                "new_tokens": own.new_tokens,
                "peer": peer,
                "peer_accuracy": score.accuracy,
                "peer_new_tokens": score.new_tokens,
                **setting.labels(),
            }
            _note_ratio(bench, quantity, own.rates, score.rates, about)
            if score.decoding:
                _note_ratio(bench, f"{quantity}_decoding", own.decoding, score.decoding, about)


def _note_ratio(bench: Bench, quantity: str, own: list[float], peer: list[float], about: dict[str, Any]) -> None:
    rates: dict[str, Any] = {"tokens_per_s": spread(own).median, "peer_tokens_per_s": spread(peer).median}
    bench.findings.add(quantity, paired_ratios(own, peer), **about, **rates)


def _own_score(bench: Bench, rounds: list[Timed[Decoded]]) -> _Score:
    whole = standing([Timed(one.seconds, one.result.result) for one in rounds], bench.questions, 1)
    return _Score(whole.rates, [one.result.tokens_per_s for one in rounds], whole.accuracy, whole.new_tokens)


def _peer_score(bench: Bench, rounds: list[Timed[PeerAnswer]]) -> _Score:
    right = [bench.questions.is_right(number, one.result.answer) for number, one in enumerate(rounds)]
    return _Score(
        rates=[one.result.tokens / one.seconds for one in rounds],
        decoding=[one.result.own_rate for one in rounds if one.result.own_rate is not None],
        accuracy=sum(right) / len(right),
        new_tokens=sum(one.result.tokens for one in rounds),
    )


def _ratio_name(setting: Setting, dtype: str, peer: str) -> str | None:
    if peer.startswith("llama.cpp"):
        return "ar_over_llamacpp" if setting.is_ar else "diffusion_over_llamacpp"
    theirs = f"transformers {_dtype_of_transformers(dtype)}"
    return "ar_over_transformers" if setting.is_ar and peer == theirs else None


def _dtype_of_transformers(dtype: str) -> str:
    """What it runs in where we run in a dtype: it has no int8 of its own, and some CPUs have no bfloat16."""
    theirs = "bfloat16" if dtype == "int8" else dtype
    return "float32" if theirs == "bfloat16" and emulates_bfloat16() else theirs


def _note_peer(bench: Bench, peer: str, score: _Score) -> None:
    program, _, rest = peer.partition(" ")
    more: dict[str, Any] = {"new_tokens": score.new_tokens}
    if score.decoding:
        more |= {"decoding_tokens_per_s": spread(score.decoding).median, "build": system_info()}
    dtype = rest if program == "transformers" else "as in the file"
    bench.findings.add("peer_tokens_per_s", score.rates, dtype=dtype, accuracy=score.accuracy, peer=peer, **more)
