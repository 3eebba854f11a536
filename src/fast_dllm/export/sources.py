"""The modules that an exported checkpoint carries: found through their imports, and made one flat folder."""

import ast
from importlib.resources import files

from fast_dllm import __version__

MODELING_FILE = "modeling_fast_dllm.py"
_MODELING = "fast_dllm.export.assets.modeling"
# What decoding needs. Anything else (checkpoints, text, training) is not for a modeling file to import.
_ALLOWED = ("config", "errors", "masks", "cache", "generation", "decoding", "engine", "model")
_PARENT = "from transformers import LlamaForCausalLM as Architecture\n"
_MAX_LENGTH = "MAX_LENGTH: int | None = None\n"


def exported_sources(architecture: str, max_length: int | None) -> dict[str, str]:
    """Every Python file of an exported checkpoint.

    Args:
        architecture: name of the transformers class that the model is, such as "LlamaForCausalLM".
        max_length: longest usable context; None if there is no limit.

    Returns:
        File name -> text, `MODELING_FILE` among them.

    Raises:
        RuntimeError: when our own modules import what cannot be exported.
    """
    sources = {f"{_flat_name(module)}.py": _flattened(module) for module in modules_needed()}
    modeling = sources[MODELING_FILE]
    modeling = _replaced(modeling, _PARENT, f"from transformers import {architecture} as Architecture\n")
    modeling = _replaced(modeling, _MAX_LENGTH, f"MAX_LENGTH: int | None = {max_length}\n")
    sources[MODELING_FILE] = modeling
    return sources


def modules_needed() -> list[str]:
    """The modeling module and all of ours that it imports, directly or not, sorted.

    Raises:
        RuntimeError: when one of them cannot be exported.
    """
    needed, unread = {_MODELING}, [_MODELING]
    while unread:
        importer = unread.pop()
        for node in _own_imports(importer):
            module = str(node.module)
            if module.partition(".")[2].partition(".")[0] not in _ALLOWED:
                raise RuntimeError(f"{importer} imports {module}, which an exported checkpoint cannot carry")
            if module not in needed:
                needed.add(module)
                unread.append(module)
    return sorted(needed)


def _source(module: str) -> str:
    package, *path = module.split(".")
    return files(package).joinpath(*path[:-1], f"{path[-1]}.py").read_text(encoding="utf-8")


def _own_imports(module: str) -> list[ast.ImportFrom]:
    """Each `from fast_dllm... import ...` of a module, those inside functions and conditions too."""
    found = []
    for node in ast.walk(ast.parse(_source(module))):
        if isinstance(node, ast.Import) and any(_is_ours(alias.name) for alias in node.names):
            raise RuntimeError(f"{module}:{node.lineno}: write 'from ... import ...'; a flat folder has no packages")
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise RuntimeError(f"{module}:{node.lineno}: relative import; name the module in full")
            if _is_ours(node.module or ""):
                found.append(node)
    return found


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == "fast_dllm"


def _flat_name(module: str) -> str:
    return MODELING_FILE.removesuffix(".py") if module == _MODELING else module.replace(".", "_")


def _flattened(module: str) -> str:
    """A module's text with our imports made relative, under a line that says where it is from."""
    lines = _source(module).splitlines(keepends=True)
    for node in _own_imports(module):
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = _replaced(
            line, f"from {node.module} import", f"from .{_flat_name(str(node.module))} import"
        )
    path = module.replace(".", "/")
    return f"# {path}.py of fast-dllm {__version__}, Apache-2.0; exported, so edit it there.\n{''.join(lines)}"


def _replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise RuntimeError(f"{old.strip()!r} must stand once in the exported source")
    return text.replace(old, new)
