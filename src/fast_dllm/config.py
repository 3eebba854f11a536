"""What a checkpoint is (`BlockDiffusionConfig`) and what a request asks for (`DecodingConfig`).

Both are frozen and validated once, when they are made.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from fast_dllm.errors import FastDLLMError

ContextAttention = Literal["block", "causal", "full"]
Policy = Literal["threshold", "factor", "fixed", "sequential"]
ConfidenceMeasure = Literal["probability", "margin", "entropy"]
SubBlockCache = Literal["none", "dual", "prefix"]
CacheRefresh = Literal["published", "sub-block", "block"]
CacheDtype = Literal["bfloat16", "int8"]
"""Of K/V in our own CPU kernels."""

_LEAST = 1e-4  # temperature and top-p: float32 has no smaller ones to divide by, or to add up to


class _FromMapping:
    """Builds a config from untrusted keys; an unknown one is an error that names the nearest known one."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "settings") -> Self:
        """Make the config from a mapping.

        Args:
            values: field names and values.
            source: what to call the mapping in an error, for example a file's name.

        Raises:
            FastDLLMError: for an unknown key or an invalid value.
        """
        known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise FastDLLMError(f"{source}: unknown key {key!r}; the nearest known one is {near!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict (JSON-ready)."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FastDLLMError(message)


def _require_choice(name: str, value: object, choices: object) -> None:
    allowed = get_args(choices)
    _require(value in allowed, f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def _require_int(name: str, value: object, minimum: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and value >= minimum, f"{name}={value!r}: must be an integer of {minimum} or more")  # type: ignore[operator]


def _require_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    inside = is_number and low <= value <= high  # type: ignore[operator]
    _require(inside, f"{name}={value!r}: must be a number from {low:g} to {high:g}")


@dataclass(frozen=True, kw_only=True)
class BlockDiffusionConfig(_FromMapping):
    """How a model was adapted; saved with every checkpoint.

    Attributes:
        mask_token_id: id of the mask token. It is never generated. None only for an autoregressive model.
        block_size: D, tokens per block (paper: 32); 1 is an autoregressive model. Ignored when `context_attention`
            is "full", where one block spans the canvas.
        token_shift: the hidden state at position i-1 predicts token i, as in the AR model it came from.
        context_attention: who sees whom among clean tokens. "block": block-causal (Fast-dLLM v2);
            "causal": token-causal, so the clean stream is the AR model; "full": everyone (Dream, LLaDA).
    """

    mask_token_id: int | None
    block_size: int = 32
    token_shift: bool = True
    context_attention: ContextAttention = "block"

    def __post_init__(self) -> None:
        _require_int("block_size", self.block_size, 1)
        if self.mask_token_id is not None:
            _require_int("mask_token_id", self.mask_token_id, 0)
        else:
            _require(self.block_size == 1, f"mask_token_id is missing: block_size={self.block_size} needs one")
        _require(isinstance(self.token_shift, bool), f"token_shift={self.token_shift!r}: must be true or false")
        _require_choice("context_attention", self.context_attention, ContextAttention)


ONE_AT_A_TIME: Mapping[str, Any] = {"block_size": 1, "small_block_size": 1}
"""Fields of `DecodingConfig` that make it autoregressive."""


@dataclass(frozen=True)
class TaskItems:
    """Generated questions that a model was trained on (`data.tasks.train_and_test`), so that nobody tests it on them.

    Attributes:
        tasks: names of the tasks.
        items: how many, over all tasks.
    """

    tasks: tuple[str, ...]
    items: int


@dataclass(frozen=True, kw_only=True)
class DecodingConfig(_FromMapping):
    """What one request asks of the decoder.

    Attributes:
        max_new_tokens: exact limit of new tokens, the stop token included.
        block_size: tokens per block; None takes the checkpoint's, 1 is autoregressive decoding.
        small_block_size: S, tokens per sub-block; must divide the block. None takes 8, or the whole block where 8 does
            not divide it. For full-attention models it is the window W of Algorithm 1 (arXiv 2505.22618): 32.
        policy: which masked tokens a step reveals; the most confident one always is.
            "threshold": confidence > `threshold`; "factor": the largest n with
            (n+1)(1 - c(n)) < `factor`; "fixed": `tokens_per_step`; "sequential": one.
        threshold: for policy "threshold"; 1.0 reveals one token a step. None takes 0.9, and 0.7 where drafts are
            verified: the answer does not depend on it then, and 0.7 takes fewer forwards.
        factor: for policy "factor".
        tokens_per_step: for policy "fixed".
        confidence: "probability" of the token, "margin" over the runner-up, or negative "entropy"
            normalised to [0, 1].
        temperature: 0 is greedy.
        top_p: nucleus sampling, used when temperature > 0.
        top_k: keep the k likeliest tokens, used when temperature > 0; 0 keeps all.
        seed: of this request's own random generator.
        stop_token_ids: None takes the checkpoint's; () never stops early.
        stop_strings: the answer ends before the first of them (needs a tokenizer).
        sub_block_cache: "dual" recomputes the sub-block only (DualCache); "prefix" the sub-block and all after it
            in the block; "none" the whole block at each step (exact). None takes "dual", and "none" for
            full-attention models.
        cache_refresh: when a whole-block forward renews a sub-block cache. "block": once per block; "sub-block":
            once per sub-block. These two forward the position before the sub-block too (token shift), and what the
            forward before revealed. "published": whenever the sub-block's first position is still masked. None
            takes "block", and "sub-block" for full-attention models (Algorithm 1).
        fused_commit: commit a finished block and take the first look at the next one in one forward. Its first
            token is then chosen with those beside it, not before them.
        verify: draft and verify. A look at `small_block_size` masks drafts tokens, as far as the policy reveals them
            without a gap; the forward that commits them says what the model itself would have said token by token,
            and looks at the next masks. The first token that differs is replaced, and what follows is drafted again:
            the answer is that of autoregressive decoding, sampled ones included, and the policy decides only how many
            forwards it takes. None does so where the model has token shift and causal context attention (train it
            with an AR loss); other models cannot. Drafting and verifying in one forward: TiDAR (arXiv 2511.08923).
    """

    max_new_tokens: int = 512
    block_size: int | None = None
    small_block_size: int | None = None
    policy: Policy = "threshold"
    threshold: float | None = None
    factor: float = 1.0
    tokens_per_step: int = 1
    confidence: ConfidenceMeasure = "probability"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    sub_block_cache: SubBlockCache | None = None
    cache_refresh: CacheRefresh | None = None
    fused_commit: bool = False
    verify: bool | None = None

    def __post_init__(self) -> None:
        _require_int("max_new_tokens", self.max_new_tokens, 1)
        if self.block_size is not None:
            _require_int("block_size", self.block_size, 1)
        if self.small_block_size is not None:
            _require_int("small_block_size", self.small_block_size, 1)
        _require_choice("policy", self.policy, Policy)
        if self.threshold is not None:
            _require_number("threshold", self.threshold, 0.0, 1.0)
        _require_number("factor", self.factor, 0.0, 1e6)
        _require_int("tokens_per_step", self.tokens_per_step, 1)
        _require_choice("confidence", self.confidence, ConfidenceMeasure)
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        _require(
            self.temperature == 0 or self.temperature >= _LEAST,
            f"temperature={self.temperature!r}: must be 0 (greedy) or at least {_LEAST:g}",
        )
        _require(
            self.top_p >= _LEAST,
            f"top_p={self.top_p!r}: must be at least {_LEAST:g} (use temperature=0 for greedy decoding)",
        )
        _require_int("top_k", self.top_k, 0)
        _require_int("seed", self.seed, 0)
        _require(
            self.stop_token_ids is None or isinstance(self.stop_token_ids, (tuple, list)),
            f"stop_token_ids={self.stop_token_ids!r}: must be a tuple of token ids",
        )
        for token in self.stop_token_ids or ():
            _require_int("stop_token_ids", token, 0)
        strings = isinstance(self.stop_strings, tuple) and all(isinstance(s, str) and s for s in self.stop_strings)
        _require(strings, f"stop_strings={self.stop_strings!r}: must be a tuple of non-empty strings")
        if self.sub_block_cache is not None:
            _require_choice("sub_block_cache", self.sub_block_cache, SubBlockCache)
        if self.cache_refresh is not None:
            _require_choice("cache_refresh", self.cache_refresh, CacheRefresh)
        _require(isinstance(self.fused_commit, bool), f"fused_commit={self.fused_commit!r}: must be true or false")
        _require(self.verify in (None, True, False), f"verify={self.verify!r}: must be true or false")

    def verifies(self, model: BlockDiffusionConfig) -> bool:
        """Whether this request drafts tokens and verifies them.

        Raises:
            FastDLLMError: when the model has no autoregressive answer.
        """
        has_answer = model.context_attention == "causal" and model.token_shift
        _require(
            has_answer or not self.verify,
            "verify=True: only a model with token shift and causal context attention has an autoregressive answer to "
            "compare with; leave it out, or adapt with --context-attention causal --ar-weight 0.5",
        )
        return has_answer if self.verify is None else self.verify

    def threshold_on(self, model: BlockDiffusionConfig) -> float:
        """The threshold of this request on a model."""
        if self.threshold is not None:
            return self.threshold
        return 0.7 if self.verifies(model) else 0.9

    def caching(self, model: BlockDiffusionConfig) -> tuple[SubBlockCache, CacheRefresh]:
        """How this request uses a sub-block cache on a model."""
        full = model.context_attention == "full"
        cache: SubBlockCache = "none" if full else "dual"
        refresh: CacheRefresh = "sub-block" if full else "block"
        return (
            cache if self.sub_block_cache is None else self.sub_block_cache,
            refresh if self.cache_refresh is None else self.cache_refresh,
        )

    def layout(self, model: BlockDiffusionConfig, canvas: int) -> tuple[int, int]:
        """Block and sub-block size of this request on a model.

        Args:
            model: the checkpoint's config.
            canvas: prompt plus `max_new_tokens`; the block of a full-attention model.

        Returns:
            (D, S).

        Raises:
            FastDLLMError: when the sub-block does not divide the block, or a block size is asked of a
                full-attention model.
        """
        if model.context_attention == "full":
            _require(
                self.block_size is None,
                "block_size: a full-attention model has one block, the canvas, and no AR mode; leave it out",
            )
            window = min(32, self.max_new_tokens) if self.small_block_size is None else self.small_block_size
            return canvas, window
        block = model.block_size if self.block_size is None else self.block_size
        if block > 1:
            _require(
                model.mask_token_id is not None,
                f"block_size={block}: this model has no mask token; adapt it first (fast-dllm adapt), "
                "or name one with mask_token_id",
            )
        small = self.small_block_size
        if small is None:
            small = 8 if block % 8 == 0 else block
        _require(
            small <= block and block % small == 0,
            f"small_block_size={small} does not divide block_size={block}; choose a divisor of {block}",
        )
        return block, small
