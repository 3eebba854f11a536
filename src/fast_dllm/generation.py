"""Prompts in, answers out: a fixed batch through the engine, in token ids."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from fast_dllm.config import BlockDiffusionConfig, DecodingConfig
from fast_dllm.decoding.events import Event, FinishReason, Statistics
from fast_dllm.engine.engine import Engine, open_state
from fast_dllm.engine.request import Request
from fast_dllm.errors import FastDLLMError
from fast_dllm.model.backbone import Backbone


@dataclass(frozen=True)
class GenerateResult:
    """Answers of a batch, one entry per prompt.

    Attributes:
        sequences: prompt and new tokens; no padding, nothing behind the stop token.
        prompt_lengths: tokens of each prompt.
        statistics: forwards and tokens of each.
        reveal_steps: per new token, the number of the forward that revealed it.
        confidences: per new token, the model's confidence when it was revealed.
        finish: "stop" or "length".
    """

    sequences: list[list[int]]
    prompt_lengths: list[int]
    statistics: list[Statistics]
    reveal_steps: list[list[int]]
    confidences: list[list[float]]
    finish: list[FinishReason | None]

    @property
    def answers(self) -> list[list[int]]:
        """The new tokens of each sequence."""
        return [ids[length:] for ids, length in zip(self.sequences, self.prompt_lengths, strict=True)]

    @property
    def total(self) -> Statistics:
        """The statistics added up."""
        return sum(self.statistics, start=Statistics())


def decoding_from_call(
    *, use_block_cache: bool | None = None, stop_token: int | Sequence[int] | None = None, **settings: Any
) -> DecodingConfig:
    """Make a `DecodingConfig` from the arguments of a `generate` call, published names included.

    Args:
        use_block_cache: published name; true is `sub_block_cache="dual"`.
        stop_token: published name of `stop_token_ids`; one id or several.
        **settings: fields of `DecodingConfig`.

    Raises:
        FastDLLMError: for an unknown or invalid setting.
    """
    if use_block_cache is not None:
        settings.setdefault("sub_block_cache", "dual" if use_block_cache else "none")
    if stop_token is not None:
        settings["stop_token_ids"] = stop_token
    if (stops := settings.get("stop_token_ids")) is not None:
        settings["stop_token_ids"] = (stops,) if isinstance(stops, int) else tuple(stops)
    return DecodingConfig.from_dict(settings, source="generate")


def for_each(
    prompts: Sequence[object], decoding: DecodingConfig | Sequence[DecodingConfig]
) -> Sequence[DecodingConfig]:
    """A setting for each prompt.

    Args:
        prompts: any number of them.
        decoding: of each; or one of all, of which prompt i draws from seed + i: equal prompts would get equal samples.

    Raises:
        FastDLLMError: when there are not as many settings as prompts.
    """
    if not isinstance(decoding, DecodingConfig):
        if len(decoding) != len(prompts):
            raise FastDLLMError(
                f"{len(prompts)} prompts, but settings for {len(decoding)}; give one of all, or as many"
            )
        return decoding
    return [replace(decoding, seed=decoding.seed + i) for i in range(len(prompts))]


def make_engine(
    backbone: Backbone,
    config: BlockDiffusionConfig,
    requests: Sequence[tuple[Sequence[int], DecodingConfig]],
    stop_token_ids: Sequence[int],
    *,
    max_batch: int = 32,
    prefill_chunk: int | None = None,
    prefix_cache: bool = False,
) -> tuple[Engine, list[Request]]:
    """An engine with a cache just large enough for some requests, and the requests, queued.

    Args:
        backbone: the model.
        config: what the checkpoint is.
        requests: prompts with their settings.
        stop_token_ids: of the checkpoint.
        max_batch: requests that run at once.
        prefill_chunk: see `Engine`. By default prompts run whole, several in a tick up to a bound.
        prefix_cache: see `Engine`. By default the forwards of a prompt are the same whatever ran before it.

    Raises:
        FastDLLMError: for a request that cannot run.
    """
    if not requests:
        raise FastDLLMError("no prompts given; pass at least one")
    if max_batch < 1:
        raise FastDLLMError(f"max_batch={max_batch}: must be 1 or more")
    states = []
    for number, (prompt, decoding) in enumerate(requests, start=1):
        with naming(number, len(requests)):
            states.append(open_state(backbone, config, prompt, decoding, stop_token_ids))
    engine = Engine(
        backbone,
        config,
        slots=min(len(requests), max_batch),
        max_length=max(state.capacity for state in states),
        stop_token_ids=stop_token_ids,
        prefill_chunk=prefill_chunk,
        prefix_cache=prefix_cache,
    )
    submitted = [engine.enqueue(state, decoding) for state, (_, decoding) in zip(states, requests, strict=True)]
    return engine, submitted


@contextmanager
def naming(number: int, count: int) -> Iterator[None]:
    """Let errors say which of several prompts they are about."""
    try:
        yield
    except FastDLLMError as error:
        raise FastDLLMError(f"prompt {number}: {error}" if count > 1 else str(error)) from error


def generate_batch(
    backbone: Backbone,
    config: BlockDiffusionConfig,
    prompts: Sequence[Sequence[int]],
    decoding: DecodingConfig | Sequence[DecodingConfig],
    stop_token_ids: Sequence[int] = (),
    *,
    max_batch: int = 32,
    on_event: Callable[[Event], None] | None = None,
    prefill_chunk: int | None = None,
) -> GenerateResult:
    """Decode a batch of prompts of any lengths.

    Args:
        backbone: the model.
        config: what the checkpoint is.
        prompts: token ids.
        decoding: settings of all prompts (see `for_each`), or of each.
        stop_token_ids: of the checkpoint.
        max_batch: prompts that run at once.
        on_event: called with every event.
        prefill_chunk: see `Engine`; None runs every prompt whole.

    Raises:
        FastDLLMError: for no prompts, an empty one, or settings that do not fit the model.
    """
    requests = list(zip(prompts, for_each(prompts, decoding), strict=True))
    engine, submitted = make_engine(
        backbone,
        config,
        requests,
        stop_token_ids,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
    )
    for event in engine.run():
        if on_event is not None:
            on_event(event)
    states = [request.state for request in submitted]
    answers = [state.answer() for state in states]
    return GenerateResult(
        sequences=[[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)],
        prompt_lengths=[state.prompt_length for state in states],
        statistics=[state.statistics for state in states],
        reveal_steps=[state.reveal_step[: len(answer)] for state, answer in zip(states, answers, strict=True)],
        confidences=[state.confidences[: len(answer)] for state, answer in zip(states, answers, strict=True)],
        finish=[state.finish for state in states],
    )
