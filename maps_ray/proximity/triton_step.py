"""The projected step in two Triton kernels, for CUDA: each reads every byte that it needs once, whatever the tensors.

The kernels find the tensors by their addresses, so that one launch covers all parameters of an optimizer. A program
handles one block of one tensor and leaves its three sums; the sums are added up in the blocks' order. `step` has the
rule, and the same form without Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from maps_ray.proximity.blocks import Segment, tabulate
from maps_ray.proximity.step import AnchoredSegments, StepInputs

_LANES = 1024
# A lane adds up eight products, and lanes add up as a tree: float32 is enough for so few.
_BLOCK = 8 * _LANES


@triton.jit
def _element(table, row, bf16: tl.constexpr):  # type: ignore[no-untyped-def]
    address = tl.load(table + row)
    return address.to(tl.pointer_type(tl.bfloat16 if bf16 else tl.float32))


@triton.jit
def _advance(  # type: ignore[no-untyped-def]
    addresses,
    parameters,
    blocks,
    rows,
    numbers,
    l2_sp,
    sums,
    count,
    bf16: tl.constexpr,
    lanes: tl.constexpr,
):
    block = tl.program_id(0)
    owner = tl.load(blocks + block)
    begin = tl.load(blocks + count + block)
    length = tl.load(blocks + 2 * count + block)
    measured = tl.load(blocks + 3 * count + block)
    row = tl.load(rows + block) * 9
    step_size = tl.load(numbers + row)
    root = tl.load(numbers + row + 1)
    share1 = tl.load(numbers + row + 2)
    beta2 = tl.load(numbers + row + 3)
    share2 = tl.load(numbers + row + 4)
    eps = tl.load(numbers + row + 5)
    decay = tl.load(numbers + row + 6)
    rate = tl.load(numbers + row + 7)
    active = tl.load(numbers + row + 8)
    pull = tl.load(l2_sp + block) * rate
    weights = _element(addresses, owner, False) + begin
    grads = _element(addresses, parameters + owner, False) + begin
    firsts = _element(addresses, 2 * parameters + owner, False) + begin
    seconds = _element(addresses, 3 * parameters + owner, False) + begin
    anchored = tl.load(addresses + 4 * parameters + owner)
    anchors = _element(addresses, 4 * parameters + owner, bf16) + begin
    inner = tl.zeros((lanes,), tl.float32)
    squared = tl.zeros((lanes,), tl.float32)
    across = tl.zeros((lanes,), tl.float32)
    along = tl.zeros((lanes,), tl.float32)
    # Tensors that begin later are left as they are.
    end = tl.where(active != 0, length, 0)
    # Where there is an anchor that is needed.
    reach = tl.where(anchored != 0, tl.where(measured != 0, end, 0), 0)
    for start in range(0, end, lanes):
        place = start + tl.arange(0, lanes)
        here = place < end
        weight = tl.load(weights + place, mask=here, other=0.0)
        grad = tl.load(grads + place, mask=here, other=0.0)
        anchor = tl.load(anchors + place, mask=place < reach, other=0.0).to(tl.float32)
        drift = weight - anchor
        first = tl.load(firsts + place, mask=here, other=0.0)
        first = first + share1 * (grad - first)
        second = beta2 * tl.load(seconds + place, mask=here, other=0.0) + share2 * grad * grad
        tilde = (weight - pull * drift) * decay - step_size * first / (tl.sqrt(second) / root + eps)
        tl.store(weights + place, tilde, mask=here)
        tl.store(firsts + place, first, mask=here)
        tl.store(seconds + place, second, mask=here)
        moved = tilde - weight
        inner += tl.where(here, grad * drift, 0.0)
        squared += tl.where(here, drift * drift, 0.0)
        # Not moved * (2 * drift + moved): of a small step far from the anchor that sum would keep a bit or two.
        across += tl.where(here, moved * drift, 0.0)
        along += tl.where(here, moved * moved, 0.0)
    keep = measured != 0
    tl.store(sums + block, tl.where(keep, tl.sum(inner), 0.0))
    tl.store(sums + count + block, tl.where(keep, tl.sum(squared), 0.0))
    tl.store(sums + 2 * count + block, tl.where(keep, 2 * tl.sum(across) + tl.sum(along), 0.0))


@triton.jit
def _pull(  # type: ignore[no-untyped-def]
    addresses, parameters, blocks, columns, amounts, count, bf16: tl.constexpr, lanes: tl.constexpr
):
    block = tl.program_id(0)
    amount = tl.load(amounts + tl.load(columns + block)).to(tl.float32)
    owner = tl.load(blocks + block)
    begin = tl.load(blocks + count + block)
    end = tl.where(amount != 0, tl.load(blocks + 2 * count + block), 0)
    weights = _element(addresses, owner, False) + begin
    anchored = tl.load(addresses + 4 * parameters + owner)
    anchors = _element(addresses, 4 * parameters + owner, bf16) + begin
    reach = tl.where(anchored != 0, end, 0)
    for start in range(0, end, lanes):
        place = start + tl.arange(0, lanes)
        here = place < end
        weight = tl.load(weights + place, mask=here, other=0.0)
        anchor = tl.load(anchors + place, mask=place < reach, other=0.0).to(tl.float32)
        tl.store(weights + place, weight - amount * (weight - anchor), mask=here)


def fits(parameters: Sequence[Tensor], anchors: Sequence[Tensor | None]) -> bool:
    """Whether the kernels can step these: contiguous float32, with anchors of one dtype, float32 or bfloat16."""
    dtypes = {anchor.dtype for anchor in anchors if anchor is not None}
    return (
        all(parameter.dtype == torch.float32 and parameter.is_contiguous() for parameter in parameters)
        and all(anchor is None or anchor.is_contiguous() for anchor in anchors)
        and len(dtypes) <= 1
        and dtypes <= {torch.float32, torch.bfloat16}
    )


class TritonStep(AnchoredSegments):
    """As `maps_ray.proximity.flat_step.FlatStep`, on parameters that fit. Padding between segments is left as it is."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        segments: Sequence[Sequence[Segment]],
        anchors: Sequence[Tensor | None],
        tensors: int,
    ) -> None:
        super().__init__(segments, anchors, tensors)
        self._device = parameters[0].device
        self._bf16 = any(anchor is not None and anchor.dtype == torch.bfloat16 for anchor in anchors)
        table, penalties, self._paces = tabulate(segments, _BLOCK)
        lengths = [0] * tensors
        for block in table:
            lengths[block[-1]] += 1
        columns = self._on_device([list(column) for column in zip(*table, strict=True)], torch.int64)
        self._blocks, self._rows, self._columns = columns[:4].contiguous(), columns[4], columns[5]
        self._l2_sp = self._on_device(penalties, torch.float32)
        self._lengths = self._on_device([lengths] * 3, torch.int64)
        self._owners = self._on_device([number for number, _, _ in self._paces], torch.int64)
        self._begins = self._on_device([begins for _, _, begins in self._paces], torch.float64)
        self._sums = torch.empty(3, len(table), dtype=torch.float32, device=self._device)
        self._addresses: Tensor | None = None

    def advance(self, given: StepInputs) -> Tensor:
        """The first pass; steps are counted on the device."""
        states, skip = given.states, given.skip
        numbers = list({id(state["step"]): state["step"] for state in states}.values())
        # Counted before anybody knows whether the step is made, and taken back below, as `torch.optim.adam._fused_adam`
        # does.
        torch._foreach_add_(numbers, 1)
        grads = [grad.contiguous() for grad in given.grads]
        moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
        self._locate(given.parameters, grads, *moments)
        chosen = [given.hyperparameters[owner] for owner, _, _ in self._paces]
        rates = [of_group.lr * rate for of_group, (_, rate, _) in zip(chosen, self._paces, strict=True)]
        fixed = self._on_device(
            [[rate, *n.betas, n.eps, 1 - rate * n.weight_decay] for n, rate in zip(chosen, rates, strict=True)],
            torch.float64,
        )
        lr, beta1, beta2, eps, decay = fixed.unbind(1)
        steps = torch.stack([state["step"] for state in states]).double()[self._owners] - self._begins
        active = steps > 0
        if skip is not None:
            active &= skip == 0
        step_size = torch.where(active, lr / (1 - beta1**steps), 0.0)
        root = torch.where(active, (1 - beta2**steps).clamp(min=0).sqrt(), 1.0)
        # 1 - 0.999 has four digits in float32.
        columns = step_size, root, 1 - beta1, beta2, 1 - beta2, eps, decay, lr, active.double()
        table = torch.stack(columns, dim=1).float()
        if skip is not None:
            torch._foreach_sub_(numbers, [skip] * len(numbers))
        count = self._rows.numel()
        _advance[(count,)](
            self._addresses,
            len(given.parameters),
            self._blocks,
            self._rows,
            table,
            self._l2_sp,
            self._sums,
            count,
            bf16=self._bf16,
            lanes=_LANES,
        )
        # Unsafe: the check of the lengths would wait for the device to read them (ATen, `SegmentReduce.cpp`).
        return torch.segment_reduce(self._sums.double(), "sum", lengths=self._lengths, axis=1, unsafe=True)

    def pull(self, parameters: Sequence[Tensor], amounts: Tensor) -> None:
        """The second pass."""
        count = self._rows.numel()
        _pull[(count,)](
            self._addresses,
            len(parameters),
            self._blocks,
            self._columns,
            amounts,
            count,
            bf16=self._bf16,
            lanes=_LANES,
        )

    def _locate(self, *tensors: Sequence[Tensor]) -> None:
        """Where all tensors lie now; they are kept alive until the kernels of this step have been started."""
        anchors = [0 if anchor is None else anchor.data_ptr() for anchor in self._anchors]
        rows = [[tensor.data_ptr() for tensor in row] for row in tensors] + [anchors]
        self._held = tensors
        self._addresses = self._on_device(rows, torch.int64)

    def _on_device(self, values: object, dtype: torch.dtype) -> Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        # From pinned memory the copy waits for nothing.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor
