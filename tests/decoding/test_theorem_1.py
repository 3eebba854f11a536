"""Theorem 1 of arXiv 2505.22618, on joint distributions small enough to write out, and the policy made of it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_dllm.decoding.policy import PolicyParameters, select


def marginals(joint):
    """[n, v] of a joint [v, ..., v]."""
    axes = range(joint.dim())
    if joint.dim() == 1:
        return joint[None]
    return torch.stack([joint.sum([other for other in axes if other != axis]) for axis in axes])


def parallel_argmax(joint):
    return tuple(marginals(joint).argmax(-1).tolist())


def joint_argmax(joint):
    return max(itertools.product(*map(range, joint.shape)), key=lambda x: joint[x].item())


def sequential_greedy(joint):
    """Most confident token first, each conditioned on those before it."""
    chosen = {}
    while len(chosen) < joint.dim():
        rest = marginals(joint)
        axis = max((a for a in range(joint.dim()) if a not in chosen), key=lambda a: rest[a].max().item())
        chosen[axis] = rest[axis].argmax().item()
        seen = torch.zeros_like(joint)
        index = tuple(chosen.get(a, slice(None)) for a in range(joint.dim()))
        seen[index] = joint[index]
        joint = seen / seen.sum()
    return tuple(chosen[a] for a in range(joint.dim()))


@st.composite
def joints(draw, reach):
    """A joint whose least marginal confidence is 1 - reach / (n + 1), or more where it must be."""
    n, v = draw(st.integers(2, 4)), draw(st.integers(2, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100_000)))
    peak = tuple(torch.randint(0, v, (n,), generator=generator).tolist())
    noise = torch.rand([v] * n, generator=generator, dtype=torch.float64) ** draw(st.sampled_from([1, 4, 16]))
    if draw(st.booleans()):
        # Only sequences one token away from the peak: where the theorem is tight.
        distance = sum((torch.arange(v) != p).long().view([-1 if a == b else 1 for b in range(n)])
                       for a, p in enumerate(peak))  # fmt: skip
        noise = noise * (distance == 1)
    noise[peak] = 0.0
    noise = noise / noise.sum()
    error = max(1 - m[p].item() for m, p in zip(marginals(noise), peak, strict=True))
    weight = min(1.0, reach / (n + 1) / error)
    joint = noise * weight
    joint[peak] += 1 - weight
    return joint, peak


@settings(max_examples=200)
@given(joints(reach=0.999))
def test_within_the_bound_parallel_decoding_equals_the_joint_argmax_and_sequential_decoding(case):
    joint, peak = case
    n = joint.dim()
    assert (n + 1) * (1 - marginals(joint).max(-1).values.min().item()) < 1
    assert parallel_argmax(joint) == joint_argmax(joint) == sequential_greedy(joint) == peak


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_bound_is_tight(n):
    # Just beyond it: n rivals, each one token away and each a little likelier than the peak.
    error = 1 / (n + 1) + 1e-3
    joint = torch.zeros([2] * n, dtype=torch.float64)
    joint[(0,) * n] = 1 - n * error
    for axis in range(n):
        joint[tuple(int(a == axis) for a in range(n))] = error
    confidence = marginals(joint).max(-1).values
    assert confidence.min().item() == pytest.approx(1 - error)
    assert (n + 1) * error == pytest.approx(1, abs=0.01)
    assert parallel_argmax(joint) == (0,) * n
    assert joint_argmax(joint) != (0,) * n
    assert sequential_greedy(joint) != (0,) * n


@settings(max_examples=200)
@given(joints(reach=2.0))
def test_tokens_that_factor_one_reveals_together_are_the_argmax_of_their_joint(case):
    joint, _ = case
    confidence = marginals(joint).max(-1).values
    factor_one = PolicyParameters(np.array([[np.inf]]), np.array([[1]]), np.array([[1.0]]))
    chosen = select(confidence.numpy()[None], np.ones((1, joint.dim()), dtype=bool), factor_one)[0]
    together = joint.sum([a for a in range(joint.dim()) if not chosen[a]]) if not chosen.all() else joint
    assert parallel_argmax(together) == joint_argmax(together)
