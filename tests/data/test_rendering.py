"""Documents rendered by other processes are those rendered here, in their order, and no further ahead than they may."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fast_dllm.data import rendering
from fast_dllm.data.rendering import render_documents
from fast_dllm.data.sources import BadRows, Document
from fast_dllm.errors import FastDLLMError
from tiny_tokenizers import MISTRAL, byte_level

TOKENIZER = byte_level(MISTRAL)


def document(number, *, is_good=True):
    question = {"role": "user", "content": f"what is {number}?"}
    turns = [question] * (1 if is_good else 2)
    return Document([*turns, {"role": "assistant", "content": f"{number} it is. " * (number % 9)}], f"chats:{number}")


def test_workers_give_the_samples_and_the_bad_rows_of_one_process_in_order():
    documents = [document(n, is_good=n % 50 != 7) for n in range(300)]
    documents[100] = Document("plain text that is cut into windows " * 9, "text:1")
    here, beside = BadRows(skip=True), BadRows(skip=True)
    expected = list(render_documents(TOKENIZER, documents, max_length=64, bad=here))
    assert len(expected) == 300
    assert len(expected[100]) > 1
    assert list(render_documents(TOKENIZER, documents, max_length=64, bad=beside, workers=2)) == expected
    assert here.count == beside.count == 6
    assert here.examples == beside.examples
    with pytest.raises(FastDLLMError, match=r"chats:7: .*roles must alternate"):
        list(render_documents(TOKENIZER, documents, max_length=64, bad=BadRows(), workers=1))


def test_workers_read_no_further_ahead_than_they_may():
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield document(read)

    samples = render_documents(TOKENIZER, endless(), max_length=64, bad=BadRows(), workers=1)
    for _ in range(200):
        next(samples)
    assert 200 <= read <= 200 + rendering._LOT * (rendering._AHEAD + 1)
    samples.close()


def workers_of(process):
    """The processes that render for a process: children that were spawned, of any of its threads."""
    children = [int(child) for task in Path(f"/proc/{process}/task").iterdir() for child in lines(task / "children")]
    return [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def lines(path):
    return path.read_text().split()


def is_running(process):
    """Whether a process still does anything: one that nobody waits for stays as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@needs_proc
def test_workers_end_with_a_process_that_is_killed(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_rendering import TOKENIZER, BadRows, document, render_documents\n"
        "if __name__ == '__main__':\n"
        "    documents = (document(n) for n in range(10**9))\n"
        "    samples = render_documents(TOKENIZER, documents, max_length=64, bad=BadRows(), workers=1)\n"
        "    next(samples)\n"
        "    print('rendered', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "rendered\n"
        workers = workers_of(parent.pid)
        assert len(workers) == 1
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    for _ in range(200):
        if not any(map(is_running, workers)):
            return
        time.sleep(0.1)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    pytest.fail("workers outlive the process that they render for")


@needs_proc
def test_a_worker_that_dies_is_one_line():
    documents = (document(n) for n in range(10**9))
    samples = render_documents(TOKENIZER, documents, max_length=64, bad=BadRows(), workers=1)
    next(samples)
    for worker in workers_of("self"):
        os.kill(worker, signal.SIGKILL)
    with pytest.raises(FastDLLMError, match="fewer --data-workers"):
        for _ in samples:
            pass
