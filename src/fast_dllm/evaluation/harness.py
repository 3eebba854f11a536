"""`BlockDiffusionLM` as lm-evaluation-harness takes a model."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.decoding.events import Statistics
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.likelihood import log_likelihood
from fast_dllm.text import ChatText, render_messages

try:
    from lm_eval.api.model import TemplateLM
except ImportError:  # `harness_tasks` says what to install before it makes a model
    TemplateLM = object

_DECODING_OPTIONS = ("temperature", "top_p", "top_k")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model that decodes in one way, for `lm_eval.simple_evaluate(model=...)` and `lm_eval.evaluate`.

    Attributes:
        lm: the model.
        statistics: of what was decoded, by (task, number of the question in it).
        cut: such questions, of which an answer reached its limit.
    """

    def __init__(
        self,
        lm: BlockDiffusionLM,
        decoding: DecodingConfig | None = None,
        *,
        max_new_tokens: int | None = None,
        max_batch: int = 16,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Wrap a model.

        Args:
            lm: with a tokenizer.
            decoding: the way to decode; None takes the defaults. Temperature, top-p, top-k, stop strings and the
                limit of an answer are the task's.
            max_new_tokens: limit of an answer, in place of the task's own.
            max_batch: questions answered at once.
            advance: called once for each question that has been answered.
        """
        super().__init__()
        self.lm = lm
        self.tokenizer: Any = lm.tokenizer
        self.statistics: dict[tuple[str, int], Statistics] = defaultdict(Statistics)
        self.cut: set[tuple[str, int]] = set()
        self._text = ChatText(lm.tokenizer)
        self._decoding = DecodingConfig() if decoding is None else decoding
        self._max_new_tokens = max_new_tokens
        self._max_batch = max_batch
        self._advance = advance

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context begins with."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; one that ends with the beginning of an answer ends inside it."""
        return render_messages(
            self.tokenizer,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, which may bring its beginning-of-text token with it, as chat templates do."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self._text.encode(string, add_special_tokens=add_special_tokens)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Decode an answer to each request.

        Args:
            requests: `Instance`s whose `args` are (prompt, generation settings).
            disable_tqdm: of lm-eval's interface; progress is `advance`'s affair.

        Raises:
            FastDLLMError: for a setting that this decoder does not have, or a prompt that fills the model's positions.
        """
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        decodings = [
            replace(self._settings(request, len(prompt)), seed=self._decoding.seed + number)
            for number, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]
        replies = self.lm.answers(prompts, decodings, max_batch=self._max_batch)
        texts = []
        for request, reply in zip(requests, replies, strict=True):
            question = (request.task_name, request.doc_id)
            if question not in self.statistics:  # some tasks ask a question several times
                self._advance()
            self.statistics[question] += reply.statistics
            if reply.finish == "length":
                self.cut.add(question)
            texts.append(reply.text)
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows where it is longer than the model's positions."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            longest = self.lm.backbone.max_length
            windows = get_rolling_token_windows(
                ids, self.prefix_token_id, max_seq_len=len(ids) if longest is None else longest, context_len=1
            )
            pairs = [make_disjoint_window(window) for window in windows]
            sums.append(sum(log_likelihood(self.lm, context, scored)[0] for context, scored in pairs))
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [log_likelihood(self.lm, context, continuation) for _, context, continuation in requests]

    def _settings(self, request: Any, prompt_length: int) -> DecodingConfig:
        """What a request asks for, on the way to decode; an answer ends where the model's positions do."""
        from lm_eval.models.utils import normalize_gen_kwargs

        asked = normalize_gen_kwargs(request.args[1])
        limit = asked.pop("max_gen_toks") if self._max_new_tokens is None else self._max_new_tokens
        longest = self.lm.backbone.max_length
        if longest is not None and prompt_length >= longest:
            raise FastDLLMError(
                f"{request.task_name}: the prompt of question {request.doc_id} takes {prompt_length} tokens, and the "
                f"model has {longest} positions; lower --few-shot"
            )
        unknown = set(asked) - {"max_gen_toks", "until", "do_sample", *_DECODING_OPTIONS}
        if asked.get("num_beams") == 1:
            unknown.discard("num_beams")
        if unknown:
            raise FastDLLMError(
                f"{request.task_name}: asks for {', '.join(sorted(unknown))}, which no decoder here has"
            )
        return replace(
            self._decoding,
            max_new_tokens=limit if longest is None else min(limit, longest - prompt_length),
            stop_strings=tuple(string for string in asked["until"] if string),
            **{name: asked[name] for name in _DECODING_OPTIONS if name in asked},
        )
