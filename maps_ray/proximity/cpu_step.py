"""The projected step compiled by Numba, for CPUs: one pass over memory, whatever the tensors.

Gradient, weight, anchor and moments of an element are read once, and what they give is written once: 32 bytes are read
and written for each fp32 parameter with an fp32 anchor, where torch's fused Adam moves 28. The three sums of a block
stay in registers in float32, and blocks are added up in float64 in their order, so the number of threads changes no
bit. Numba compiles at the first use and keeps the machine code beside this file or in the user's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from maps_ray.proximity.blocks import Segment, tabulate
from maps_ray.proximity.step import AnchoredSegments, Hyperparameters, StepInputs

# So many products add up in float32, before float64 takes over.
_BLOCK = 1 << 14
_TASK = 1 << 19
"""Elements that a thread takes at a time: about a millisecond."""

Kernel = TypeVar("Kernel", bound=Callable[..., object])


def _compiled(**options: object) -> Callable[[Kernel], Kernel]:
    def compile_(function: Kernel) -> Kernel:
        # As numpy divides: without it a check for zero keeps the loop from being vectorised.
        chosen = {"error_model": "numpy", "nogil": True, **options}
        try:
            compiled: Kernel = njit(cache=True, **chosen)(function)
        except RuntimeError:  # no folder for the machine code can be written to
            compiled = njit(**chosen)(function)
        return compiled

    return compile_


@intrinsic
def _floats(context, address):  # type: ignore[no-untyped-def]
    return types.CPointer(types.float32)(types.int64), _pointer


@intrinsic
def _halves(context, address):  # type: ignore[no-untyped-def]
    return types.CPointer(types.uint16)(types.int64), _pointer


def _pointer(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
    return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))


# Sums may be taken in another order, as vectors; the functions below keep the order in which they round. Else
# (weight + update) - weight would become the update, which is not what a weight moves by.
@_compiled(forceinline=True)
def _adam(weight, grad, first, second, share1, beta2, share2, root, eps, step_size):  # type: ignore[no-untyped-def]
    first = first + share1 * (grad - first)
    second = beta2 * second + share2 * grad * grad
    return weight - step_size * first / (np.sqrt(second) / root + eps), first, second


@_compiled(forceinline=True)
def _difference(left, right):  # type: ignore[no-untyped-def]
    return left - right


@_compiled(forceinline=True)
def _pulled(weight, amount, drift):  # type: ignore[no-untyped-def]
    return weight - amount * drift


@_compiled(forceinline=True)
def _value(anchor):  # type: ignore[no-untyped-def]
    # uint16 holds the bits of a bfloat16, the upper half of a float32.
    # Numba knows the type when it compiles, so that the loop has no such branch.
    if isinstance(anchor, np.uint16):
        return np.uint32(np.uint32(anchor) << np.uint32(16)).view(np.float32)
    return anchor


@_compiled(fastmath={"reassoc"})
def _advance_block(weights, grads, firsts, seconds, anchors, numbers, penalty, sums):  # type: ignore[no-untyped-def]
    step_size, root, share1, beta2, share2, eps, kept, rate = numbers[:8]
    pull = penalty * rate
    inner = squared = across = along = np.float32(0)
    for index in range(len(weights)):
        weight, grad = weights[index], grads[index]
        drift = _difference(weight, _value(anchors[index]))
        decayed = kept * _pulled(weight, pull, drift)
        tilde, first, second = _adam(
            decayed, grad, firsts[index], seconds[index], share1, beta2, share2, root, eps, step_size
        )
        weights[index], firsts[index], seconds[index] = tilde, first, second
        inner += grad * drift
        squared += drift * drift
        moved = _difference(tilde, weight)
        # Not moved * (2 * drift + moved): of a small step far from the anchor that sum would keep a bit or two.
        across += moved * drift
        along += moved * moved
    sums[0], sums[1], sums[2] = inner, squared, 2 * np.float64(across) + along


@_compiled()
def _pull_block(weights, anchors, amount):  # type: ignore[no-untyped-def]
    for index in range(len(weights)):
        weights[index] = _pulled(weights[index], amount, _difference(weights[index], _value(anchors[index])))


@_compiled()
def _advance(blocks, penalties, addresses, widths, numbers, zeros, sums, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        owner, begin, length, measured, row = blocks[block, :5]
        sums[block, :] = 0
        if numbers[row, 8] == 0:
            continue
        weights = carray(_floats(addresses[0, owner] + 4 * begin), length)
        grads = carray(_floats(addresses[1, owner] + 4 * begin), length)
        firsts = carray(_floats(addresses[2, owner] + 4 * begin), length)
        seconds = carray(_floats(addresses[3, owner] + 4 * begin), length)
        anchors = addresses[4, owner] + widths[owner] * begin
        chosen, penalty, own = numbers[row], penalties[block], sums[block]
        if measured and widths[owner] == 2:
            halves = carray(_halves(anchors), length)
            _advance_block(weights, grads, firsts, seconds, halves, chosen, penalty, own)
        elif measured and widths[owner] == 4:
            floats = carray(_floats(anchors), length)
            _advance_block(weights, grads, firsts, seconds, floats, chosen, penalty, own)
        else:
            _advance_block(weights, grads, firsts, seconds, zeros[:length], chosen, penalty, own)
        if not measured:
            own[:] = 0


@_compiled()
def _pull(blocks, addresses, widths, amounts, zeros, start, stop):  # type: ignore[no-untyped-def]
    for block in range(start, stop):
        owner, begin, length, _, _, column = blocks[block, :6]
        amount = np.float32(amounts[column])
        if amount == 0:
            continue
        weights = carray(_floats(addresses[0, owner] + 4 * begin), length)
        anchors = addresses[1, owner] + widths[owner] * begin
        if widths[owner] == 2:
            _pull_block(weights, carray(_halves(anchors), length), amount)
        elif widths[owner] == 4:
            _pull_block(weights, carray(_floats(anchors), length), amount)
        else:
            _pull_block(weights, zeros[:length], amount)


@_compiled()
def _collect(blocks, sums, totals):  # type: ignore[no-untyped-def]
    for block in range(len(blocks)):
        for row in range(3):
            totals[row, blocks[block, 5]] += sums[block, row]


def fits(parameters: Sequence[Tensor], anchors: Sequence[Tensor | None]) -> bool:
    """Whether the loops can step these: contiguous float32 with anchors in float32 or bfloat16."""
    return all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in parameters) and all(
        anchor is None or (anchor.dtype in (torch.float32, torch.bfloat16) and anchor.is_contiguous())
        for anchor in anchors
    )


class CpuStep(AnchoredSegments):
    """As `maps_ray.proximity.flat_step.FlatStep`, on parameters that fit. Padding between segments is left as it is."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        segments: Sequence[Sequence[Segment]],
        anchors: Sequence[Tensor | None],
        tensors: int,
    ) -> None:
        super().__init__(segments, anchors, tensors)
        table, penalties, self._paces = tabulate(segments, _BLOCK)
        self._blocks = np.array(table, dtype=np.int64).reshape(-1, 6)
        self._penalties = np.array(penalties, dtype=np.float32)
        self._widths = np.array([0 if anchor is None else anchor.element_size() for anchor in anchors], dtype=np.int64)
        self._sums = np.zeros((len(table), 3))
        self._zeros = np.zeros(_BLOCK, dtype=np.float32)
        ends = np.cumsum(self._blocks[:, 2])
        tasks = -(-int(ends[-1]) // _TASK) if len(ends) else 0
        borders = [0, *np.searchsorted(ends, [_TASK * (index + 1) for index in range(tasks)], "left") + 1]
        self._tasks = [(begin, min(end, len(table))) for begin, end in pairwise(borders)]

    def advance(self, given: StepInputs) -> Tensor:
        """The first pass; where a step is skipped all sums are 0."""
        states = given.states
        sums = np.zeros((3, self.tensors))
        if given.skip is not None and given.skip.numpy() != 0:
            return torch.from_numpy(sums)
        # Parts of one flat share their step number.
        counts = {id(state["step"]): state["step"] for state in states}
        torch._foreach_add_(list(counts.values()), 1)
        # One tensor, one read: `tolist` of each would be a call for each parameter.
        made = dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True))
        rows = [
            _numbers(given.hyperparameters[owner], made[id(states[owner]["step"])] - begins, rate)
            for owner, rate, begins in self._paces
        ]
        numbers = np.array(rows, dtype=np.float64).astype(np.float32).reshape(-1, 9)
        moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
        # At every step: gradients are new tensors, and DeepSpeed may have moved a flat's storage.
        addresses = _addresses(given.parameters, given.grads, *moments, self._anchors)
        fixed = self._blocks, self._penalties, addresses, self._widths, numbers, self._zeros, self._sums
        self._in_threads(_advance, *fixed)
        _collect(self._blocks, self._sums, sums)
        return torch.from_numpy(sums)

    def pull(self, parameters: Sequence[Tensor], amounts: Tensor) -> None:
        """The second pass."""
        shares = amounts.numpy()
        if shares.any():
            addresses = _addresses(parameters, self._anchors)
            self._in_threads(_pull, self._blocks, addresses, self._widths, shares, self._zeros)

    def _in_threads(self, function: Callable[..., object], *arguments: object) -> None:
        """Runs all blocks with as many threads as torch uses."""
        threads = min(torch.get_num_threads(), len(self._tasks))
        if threads < 2:
            function(*arguments, 0, len(self._blocks))
            return
        # Made anew: threads do not live on in a process that is forked.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda task: function(*arguments, *task), self._tasks))


def _addresses(*rows: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in rows], dtype=np.int64)


def _numbers(numbers: Hyperparameters, step: float, rate: float) -> list[float]:
    """What the elements of a pace are stepped with; in float64, because 1 - 0.999 has four digits in float32."""
    if step <= 0:
        return [0.0] * 9
    lr, (beta1, beta2) = numbers.lr * rate, numbers.betas
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    return [step_size, root, 1 - beta1, beta2, 1 - beta2, numbers.eps, 1 - lr * numbers.weight_decay, lr, 1.0]
