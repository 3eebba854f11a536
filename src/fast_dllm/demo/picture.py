"""What the page draws, as numbers and colours: the reveal order of an answer, and the loss curve."""

import math
from typing import Any

# Viridis: ordered in lightness, so that the order of the forwards is seen without colour vision too.
_SCALE = ("482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
_SHOWN = str.maketrans({"\n": "⏎", " ": "·", "\t": "⇥"})

CHART_WIDTH, CHART_HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 30, 16, 34, 40


def colour_of(step: int, steps: int) -> tuple[str, str]:
    """Background and ink of a token revealed by forward `step` of `steps`."""
    place = step / max(steps - 1, 1) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    mixed = [
        round(int(_SCALE[low][i : i + 2], 16) * (1 - place + low) + int(_SCALE[low + 1][i : i + 2], 16) * (place - low))
        for i in (0, 2, 4)
    ]
    luminance = (0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2]) / 255
    return "#" + "".join(f"{channel:02x}" for channel in mixed), "#111" if luminance > 0.5 else "#fff"


def reveal_picture(question: dict[str, Any], block_size: int) -> dict[str, Any]:
    """One question's two answers as boxes.

    Args:
        question: an entry of the report's `questions`.
        block_size: of the diffusion answer.

    Returns:
        For the template: blocks of boxes, the boxes of the AR answer, and a bar for every forward.
    """
    diffusion, ar = question["diffusion"], question["ar"]
    forwards = diffusion["forwards"]
    boxes = _boxes(diffusion)
    start = question["prompt_length"]
    blocks: dict[int, list[dict[str, Any]]] = {}
    for offset, box in enumerate(boxes):
        blocks.setdefault((start + offset) // block_size, []).append(box)
    counts = [diffusion["reveal_steps"].count(step) for step in range(forwards)]
    return {
        "blocks": [
            {
                "first": number * block_size,
                "last": (number + 1) * block_size - 1,
                "prompt": max(start - number * block_size, 0),
                "boxes": inside,
            }
            for number, inside in blocks.items()
        ],
        "ar": _boxes(ar),
        "bars": [
            {"step": step, "count": count, "colour": colour_of(step, forwards)[0]} for step, count in enumerate(counts)
        ],
        "forwards": forwards,
        "ar_forwards": ar["forwards"],
        "longest": max(forwards, ar["forwards"]),
    }


def _boxes(answer: dict[str, Any]) -> list[dict[str, Any]]:
    boxes = []
    for token, step, confidence in zip(answer["tokens"], answer["reveal_steps"], answer["confidences"], strict=True):
        colour, ink = colour_of(step, answer["forwards"])
        text = token.translate(_SHOWN) or "∅"
        special = token.startswith("<") and token.endswith(">") and len(token) > 2
        boxes.append(
            {
                "text": text,
                "special": special,
                "step": step,
                "confidence": confidence,
                "colour": colour,
                "ink": ink,
                "newline": token.endswith("\n"),
            }
        )
    return boxes


def loss_chart(live: dict[str, Any]) -> dict[str, Any] | None:
    """The loss curve of the live adaptation as points of a drawing.

    Args:
        live: the report's `live_adaptation`.

    Returns:
        Points and ticks for the template; None when no step was made.
    """
    log = live["log"]
    if not log:
        return None
    held_out = [loss for loss in (live["loss_before"], live["loss_after"]) if loss is not None]
    top: int = max(math.ceil(max([entry["loss"] for entry in log] + held_out)), 1)
    end: float = max(entry["elapsed_s"] for entry in log) or 1.0

    def x(seconds: float) -> float:
        return round(_LEFT + seconds / end * (CHART_WIDTH - _LEFT - _RIGHT), 1)

    def y(loss: float) -> float:
        return round(CHART_HEIGHT - _BOTTOM - loss / top * (CHART_HEIGHT - _TOP - _BOTTOM), 1)

    step = max(1, math.ceil(top / 5))
    return {
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "left": _LEFT,
        "right": CHART_WIDTH - _RIGHT,
        "bottom": CHART_HEIGHT - _BOTTOM,
        "line": " ".join(f"{x(entry['elapsed_s'])},{y(entry['loss'])}" for entry in log),
        "y_ticks": [{"at": y(value), "label": value} for value in range(0, top + 1, step)],
        "x_ticks": [{"at": x(end * part / 4), "label": _clock(end * part / 4)} for part in range(5)],
        "held_out": [
            {"x": x(seconds), "y": y(loss), "label": f"{loss:.2f}"}
            for seconds, loss in ((0.0, live["loss_before"]), (end, live["loss_after"]))
            if loss is not None
        ],
    }


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
