"""Tasks of lm-evaluation-harness as benchmarks: its prompts, few-shot rules and scorers, our decoding."""

import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fast_dllm.api import BlockDiffusionLM
from fast_dllm.config import DecodingConfig
from fast_dllm.data.rows import json_object
from fast_dllm.data.sources import decode, numbered_lines, one_line, open_file
from fast_dllm.data.tasks import TASKS
from fast_dllm.errors import FastDLLMError
from fast_dllm.evaluation.outcome import Outcome
from fast_dllm.evaluation.punkt_tab import provide_punkt_tab

EXAMPLES = "few-shot"
"""What follows a task's name and a colon to name the file of its few-shot examples."""

_ASKED, _SHOWN = "test", "train"
_FEW_SHOT_SEED = 1234  # lm-eval's own


class HarnessBenchmark:
    """One task of lm-evaluation-harness.

    Attributes:
        name: of the task.
        count: how many questions.
        decodes: false for a task that compares likelihoods (multiple choice).
        settings: what else it takes to ask the same again.
    """

    def __init__(self, task: Any, *, limit: int | None = None, max_new_tokens: int | None = None) -> None:
        """Take a loaded task.

        Args:
            task: an `lm_eval.api.task.Task`.
            limit: of its questions; None asks all.
            max_new_tokens: limit of an answer, in place of the task's own.
        """
        self.name: str = task.task_name
        self.decodes: bool = task.OUTPUT_TYPE == "generate_until"
        questions = len(task.eval_docs)
        self.count: int = questions if limit is None else min(limit, questions)
        self.settings: dict[str, Any] = {
            "lm_eval": version("lm_eval"),
            "version": task.VERSION,
            "few_shot": task.config.num_fewshot,
            "max_new_tokens": max_new_tokens,
        }
        self._task = task
        self._max_new_tokens = max_new_tokens

    def ask(
        self, lm: BlockDiffusionLM, decoding: DecodingConfig, *, max_batch: int, advance: Callable[[], None]
    ) -> Outcome:
        """Ask every question (see `Benchmark.ask`).

        Raises:
            FastDLLMError: for a task whose score of a question is not right or wrong, or as `HarnessModel` does.
        """
        from lm_eval import evaluate

        from fast_dllm.evaluation.harness import HarnessModel

        model = HarnessModel(lm, decoding, max_new_tokens=self._max_new_tokens, max_batch=max_batch, advance=advance)
        # The examples are drawn while requests are built: every way is to be asked with the same.
        self._task.set_fewshot_seed(_FEW_SHOT_SEED)
        _repeat_language_detection()
        with _hushed():
            results = evaluate(
                model,
                {"tasks": {self.name: self._task}},
                limit=self.count,
                bootstrap_iters=0,
                apply_chat_template=bool(getattr(lm.tokenizer, "chat_template", None)),
                fewshot_as_multiturn=True,
            )
        samples = results["samples"][self.name]
        metric, judge = samples[0]["metrics"][0], samples[-1]["filter"]
        judged = {sample["doc_id"]: self._is_right(sample[metric]) for sample in samples if sample["filter"] == judge}
        if not self.decodes:
            for _ in judged:
                advance()
        return Outcome(
            tasks=[self.name] * len(judged),
            right=list(judged.values()),
            statistics=[model.statistics[self.name, number] for number in judged],
            cut=[(self.name, number) in model.cut for number in judged],
            metrics={self.name: _metrics(results["results"][self.name], first=f"{metric},{judge}")},
        )

    def _is_right(self, score: Any) -> bool:
        if score not in (0, 1):
            raise FastDLLMError(f"{self.name}: scores a question {score!r}, which is neither right nor wrong")
        return bool(score)


def load_benchmarks(
    names: Sequence[str],
    *,
    data: Mapping[str, str] | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> list[HarnessBenchmark]:
    """Load tasks of lm-evaluation-harness.

    Args:
        names: of tasks, or of groups of tasks.
        data: JSONL files in place of data sets on the hub: questions by task, few-shot examples by "task:few-shot".
        few_shot: examples before each question, where a task can show any; None takes each task's own number.
        limit: questions of each task; None asks all.
        max_new_tokens: limit of an answer; None takes each task's own, or lm-eval's default of 256.

    Raises:
        FastDLLMError: for an unknown task, a file that cannot be read, or when something is not installed.
    """
    files = {} if data is None else data
    for key, file in files.items():
        _check_key(key, names, files)
        _check_rows(Path(file))
    if not names:
        return []
    manager = _task_manager(names)
    tasks = [task for name in dict.fromkeys(names) for task in _load(manager, name, files)]
    for task in tasks:
        _set_few_shot(task, few_shot)
        if getattr(task, "UNSAFE_CODE", False):
            raise FastDLLMError(f"{task.task_name}: runs what the model writes, which is not offered here")
    return [HarnessBenchmark(task, limit=limit, max_new_tokens=max_new_tokens) for task in tasks]


def _check_key(key: str, names: Sequence[str], files: Mapping[str, str]) -> None:
    """Whether a file is for one of the tasks."""
    name, colon, kind = key.partition(":")
    if name not in names or (colon and kind != EXAMPLES):
        raise FastDLLMError(f"--benchmark-data {key}: must be a benchmark of --task, or BENCHMARK:{EXAMPLES}")
    if name not in files:
        raise FastDLLMError(f"--benchmark-data {key}: its questions are missing; give --benchmark-data {name}=FILE too")


def _task_manager(names: Sequence[str]) -> Any:
    try:
        manager = _index(tuple(names))
    except ImportError as error:
        raise FastDLLMError(
            f"task {', '.join(names)}: unknown; choose from {', '.join(TASKS)}, or for lm-evaluation-harness's tasks "
            "run pip install '.[eval]' in fast-dllm's directory"
        ) from error
    for name in names:
        if name not in manager.task_index:
            raise FastDLLMError(
                f"task {name!r}: unknown; choose from {', '.join(TASKS)}, or from what lm-eval ls tasks lists"
            )
    return manager


@cache
def _index(names: tuple[str, ...]) -> Any:
    """lm-eval's index of its tasks, or of what lies in the folders of some.

    Most tasks have a folder of their name. To read all definitions, fourteen thousand of them, takes many seconds.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    folders = [root / name for name in names if (root / name).is_dir()]
    few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)
    # A group of tasks may have members elsewhere.
    return few if all(name in few.all_subtasks for name in names) else lm_eval.tasks.TaskManager()


def _load(manager: Any, name: str, files: Mapping[str, str]) -> list[Any]:
    """The tasks of a name.

    lm-eval raises what the hub, `datasets`, jinja and the tasks' own code raise.
    """
    asked, shown = files.get(name), files.get(f"{name}:{EXAMPLES}")
    if "ifeval" in name:
        try:
            provide_punkt_tab()
        except FastDLLMError as error:
            raise FastDLLMError(f"{name}: {error}") from error
    try:
        with _hushed():
            loaded = manager.load([name if asked is None else _local(name, asked, shown)])
    except ModuleNotFoundError as error:
        raise FastDLLMError(
            f"{name}: needs {error.name}, which is not installed; run pip install {error.name}"
        ) from error
    except Exception as error:
        remedy = (
            f"without a network, give --benchmark-data {name}=FILE"
            if asked is None
            else f"the lines of {asked} must be those of the task's own data set"
        )
        raise FastDLLMError(f"{name}: lm-eval cannot load it ({one_line(error)}); {remedy}") from error
    return list(loaded["tasks"].values())


def _local(name: str, asked: str, shown: str | None) -> dict[str, Any]:
    """A built-in task on files of our own: a group of one, since only members of a group can be overridden."""
    files = {_ASKED: asked} if shown is None else {_ASKED: asked, _SHOWN: shown}
    examples = None if shown is None else _SHOWN
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "test_split": _ASKED,
        "validation_split": None,
        "training_split": examples,
        "fewshot_split": examples,
    }
    return {"group": f"local {name}", "task": [task]}


def _check_rows(path: Path) -> None:
    rows = 0
    with open_file(path) as file:
        for number, line in numbered_lines(file):
            try:
                json_object(decode(line), "a row of the task's data set")
            except FastDLLMError as error:
                raise FastDLLMError(f"{path}:{number}: {error}") from error
            rows += 1
    if not rows:
        raise FastDLLMError(f"{path}: has no questions; write one per line, as JSON")


def _set_few_shot(task: Any, few_shot: int | None) -> None:
    own = task.config.num_fewshot
    if own is None or (few_shot is not None and own != 0):  # lm-eval's rule: a task that says 0 means it
        task.set_config("num_fewshot", 0 if few_shot is None else few_shot)
    shown, name = task.config.num_fewshot, task.task_name
    if not shown:
        return
    config = task.fewshot_cfg
    has_examples = config.split or config.samples or task.has_training_docs() or task.has_validation_docs()
    # A task without examples would show its own questions.
    given = len(task.fewshot_docs()) if has_examples else 0
    if shown > given:
        raise FastDLLMError(
            f"{name}: shows {shown} examples, and {given} are given; give --benchmark-data {name}:{EXAMPLES}=FILE, or "
            f"--few-shot {given}"
        )


def _metrics(results: Mapping[str, Any], *, first: str) -> dict[str, float]:
    """The scores among what lm-eval reports of a task, the one that says what is right first."""
    scores = {name: value for name, value in results.items() if "," in name and "_stderr," not in name}
    return {first: scores[first], **scores}


def _repeat_language_detection() -> None:
    """Let ifeval's detector of languages say the same of the same answer: it samples, from a seed of the system's."""
    with suppress(ImportError):  # not every task needs it
        from langdetect import DetectorFactory

        DetectorFactory.seed = 0


@contextmanager
def _hushed() -> Iterator[None]:
    """No progress bars and no advice from lm-eval and `datasets` inside; what they raise says what is wrong."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
