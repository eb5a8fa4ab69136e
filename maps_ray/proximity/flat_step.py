"""The projected step in torch's own operations, for any device, and the choice between it and the compiled forms."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from maps_ray.proximity.blocks import Block, Segment, lay_out
from maps_ray.proximity.step import AnchoredSegments, Hyperparameters, ProjectedStep, StepInputs


def fused_is_there(tensors: Sequence[Tensor]) -> bool:
    """Whether torch has a fused Adam for all of `tensors`."""
    # Private in torch 2.13, but what `torch.optim.Adam(fused=True)` itself asks before it raises.
    devices = _get_fused_kernels_supported_devices()
    return all(tensor.is_floating_point() and tensor.device.type in devices for tensor in tensors)


def make_step(
    parameters: Sequence[Tensor],
    segments: Sequence[Sequence[Segment]],
    anchors: Sequence[Tensor | None],
    groups: Sequence[int],
    tensors: int,
    fused: bool,
) -> ProjectedStep:
    """For a fused step Numba's loops on a CPU, and on CUDA Triton's kernels where it is there; else `FlatStep`.

    All take the same arguments, and float32 or what `FlatStep` alone can step.
    """
    if fused and parameters[0].device.type == "cpu":
        # Not above: it takes a second that a run on an accelerator can save.
        from maps_ray.proximity import cpu_step

        if cpu_step.fits(parameters, anchors):
            return cpu_step.CpuStep(parameters, segments, anchors, tensors)
    if fused and parameters[0].device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        # Not above: Triton is not everywhere.
        from maps_ray.proximity import triton_step

        if triton_step.fits(parameters, anchors):
            return triton_step.TritonStep(parameters, segments, anchors, tensors)
    return FlatStep(parameters, segments, anchors, groups, tensors, fused)


class FlatStep(AnchoredSegments):
    """The blocks of some parameters, and the two passes over them.

    Args:
        parameters: what the optimizer steps, of any shape, of one real floating dtype and on one device.
        segments: of each parameter, in the order in which they lie in it. Padding between them is stepped along.
        anchors: of each parameter, of its shape and on its device, kept by reference; none means zeros.
        groups: of each parameter, a number that parameters with the same hyperparameters share.
        tensors: how many columns the sums have.
        fused: whether the Adam step is torch's fused one, else that of `torch.optim.Adam(foreach=False)`; to the bit.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        segments: Sequence[Sequence[Segment]],
        anchors: Sequence[Tensor | None],
        groups: Sequence[int],
        tensors: int,
        fused: bool,
    ) -> None:
        super().__init__(segments, anchors, tensors)
        self.fused = fused
        self._device = parameters[0].device
        self._on_cpu = self._device.type == "cpu"
        # In half precision the difference of two near weights would keep one or two bits.
        self._dtype = torch.promote_types(torch.float32, parameters[0].dtype)
        anchored = [anchor is not None for anchor in anchors]
        self._sizes, self._blocks = lay_out(parameters, segments, anchored, groups, self._dtype, tensors)
        self._anchor_parts: list[Sequence[Tensor]] = [
            () if anchor is None else self._cut(anchor, sizes)
            for anchor, sizes in zip(anchors, self._sizes, strict=True)
        ]
        measured = [block for block in self._blocks if block.measured]
        longest = max((block.numel for block in measured), default=0)
        shared = max((block.numel for block in measured if block.shared), default=0)
        self._scratch = [torch.empty(longest, dtype=self._dtype, device=self._device) for _ in range(2)]
        copied = max((block.numel for block in measured if not block.direct), default=0)
        self._scratch += [torch.empty(copied, dtype=self._dtype, device=self._device) for _ in range(2)]
        # An accelerator adds segments up as trees, for which float32 is enough.
        sums = torch.float64 if self._on_cpu else self._dtype
        self._products = torch.empty(3, shared, dtype=sums, device=self._device)
        # Views made once: making one takes as long as adding up a thousand numbers.
        self._space = {
            id(block): [scratch[: block.numel] for scratch in self._scratch[: 2 if block.direct else 4]]
            for block in measured
        }
        self._sums = {
            id(block): (products := self._products[:, : block.numel], *products.unbind())
            for block in measured
            if block.shared
        }
        self._places = {id(block): self._views(block) for block in measured if not block.direct}

    def advance(self, given: StepInputs) -> Tensor:
        """The first pass, block by block."""
        states, skip, number = given.states, given.skip, given.number
        # Parts of one flat share their step number.
        torch._foreach_add_(list({id(state["step"]): state["step"] for state in states}.values()), 1)
        weights, grad_parts = self._parts(given.parameters), self._parts(given.grads)
        first, second = (self._parts([state[key] for state in states]) for key in ("exp_avg", "exp_avg_sq"))
        adam = _Adam([state["step"] for state in states], self.fused, skip)
        dots: list[Tensor] = []
        owners: list[int] = []
        sums: list[Tensor] = []
        columns: list[Tensor] = []
        for block in self._blocks:
            if block.begins and (number is None or number <= block.begins):
                continue
            here, grad = _pick(weights, block), _pick(grad_parts, block)
            state = here, grad, _pick(first, block), _pick(second, block), block, given.hyperparameters[block.parameter]
            if not block.measured:
                adam(*state)
                continue
            before, drift = self._drift(block, here)
            flat_grad = grad[0] if block.direct else self._gather(block, 2, grad)
            if block.shared:
                products, opposing, square, growing = self._sums[id(block)]
                torch.mul(flat_grad, drift, out=opposing)
                torch.mul(drift, drift, out=square)
            else:
                dots += torch.dot(flat_grad, drift), torch.dot(drift, drift)
            if block.l2_sp is not None:
                # From where the weights are before Adam's step, as AdamW decays.
                rate = given.hyperparameters[block.parameter].lr * block.rate
                pull = (drift * block.l2_sp).mul_(rate)
                self._subtract(block, here, pull if skip is None else pull.mul_(1 - skip))
            adam(*state)
            moved = self._moved(block, here, before, drift)
            if block.shared:
                torch.mul(moved, drift.mul_(2).add_(moved), out=growing)
                # Unsafe: the check of the lengths would wait for the device to read them (ATen, `SegmentReduce.cpp`).
                sums.append(torch.segment_reduce(products, "sum", lengths=block.lengths, axis=1, unsafe=True))
                columns.append(block.columns)
            else:
                dots += torch.dot(moved, drift), torch.dot(moved, moved)
                owners += (segment.tensor for segment, _ in block.pieces if segment)
        if skip is not None:
            # Counted before anybody knew; `torch.optim.adam._fused_adam` takes them back in the same way.
            numbers = list({id(state["step"]): state["step"] for state in states}.values())
            torch._foreach_sub_(numbers, [skip] * len(numbers))
        whole = torch.zeros(self.tensors + 1, 3, dtype=torch.float64, device=self._device)
        if dots:
            inner, squared, across, along = torch.stack(dots).double().view(-1, 4).t()
            sums.append(torch.stack((inner, squared, 2 * across + along)))
            columns.append(torch.tensor(owners, device=self._device))
        if sums:
            # In their order: index_put_ is deterministic where index_add_ is not.
            values = torch.cat([part.double() for part in sums], dim=1)
            whole.index_put_((torch.cat(columns),), values.t(), accumulate=True)
        return whole[:-1].t().contiguous()

    def pull(self, parameters: Sequence[Tensor], amounts: Tensor) -> None:
        """The second pass."""
        # On a CPU the numbers are at hand, and most tensors need no pull.
        known = amounts.tolist() if self._on_cpu else None
        weights = self._parts(parameters)
        # Padding has a column of its own, and stays.
        shares = torch.cat((amounts, amounts.new_zeros(1))).to(self._dtype)
        for block in self._blocks:
            if not block.projected:
                continue
            if known and not any(known[segment.tensor] for segment, _ in block.pieces if segment):
                continue
            here = _pick(weights, block)
            segment = block.pieces[0][0]
            if known and segment and block.direct and not block.shared:
                self._move(block, here[0], known[segment.tensor])
                continue
            _, drift = self._drift(block, here)
            # With `output_size` torch need not ask the device how long the result is.
            share = torch.repeat_interleave(shares[block.columns], block.lengths[0], output_size=block.numel)
            self._subtract(block, here, drift.mul_(share))

    def _drift(self, block: Block, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Copies of the weights and of their difference from the anchors; one and the same without anchors."""
        before = self._space[id(block)][0].copy_(weights[0]) if block.direct else self._gather(block, 0, weights)
        return before, self._difference(block, before)

    def _difference(self, block: Block, weight: Tensor) -> Tensor:
        """Of a block's flat weights from its anchors; the weights themselves without anchors."""
        if not block.anchored:
            return weight
        anchors = _pick(self._anchor_parts, block)
        drift = self._space[id(block)][1]
        if block.direct and anchors[0].dtype == self._dtype:
            return torch.sub(weight, anchors[0], out=drift)
        if block.direct:
            drift.copy_(anchors[0])
        else:
            self._gather(block, 1, anchors)
        return torch.sub(weight, drift, out=drift)

    def _moved(self, block: Block, weights: list[Tensor], before: Tensor, drift: Tensor) -> Tensor:
        """What the step did; `before` is given up for it."""
        after = weights[0] if block.direct else self._gather(block, 3, weights)
        return torch.sub(after, before, out=self._space[id(block)][1] if drift is before else before)

    def _subtract(self, block: Block, weights: list[Tensor], amount: Tensor) -> None:
        if block.direct:
            weights[0].sub_(amount)
        else:
            self._space[id(block)][3].copy_(amount)
            torch._foreach_sub_(weights, self._places[id(block)][3])

    def _move(self, block: Block, weight: Tensor, amount: float) -> None:
        """Toward the anchor, one tensor's contiguous part."""
        if not block.anchored:
            weight.sub_(weight, alpha=amount)
            return
        (anchor,) = _pick(self._anchor_parts, block)
        if anchor.dtype != weight.dtype:
            anchor = self._space[id(block)][1].copy_(anchor)
        weight.lerp_(anchor, amount)

    def _gather(self, block: Block, place: int, tensors: list[Tensor]) -> Tensor:
        """The members behind one another in scratch memory."""
        torch._foreach_copy_(self._places[id(block)][place], tensors)
        return self._space[id(block)][place]

    def _views(self, block: Block) -> list[list[Tensor]]:
        lengths = [shape.numel() for shape in block.shapes]
        return [
            [part.view(shape) for part, shape in zip(scratch[: block.numel].split(lengths), block.shapes, strict=True)]
            for scratch in self._scratch
        ]

    def _parts(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        return [self._cut(tensor, sizes) for tensor, sizes in zip(tensors, self._sizes, strict=True)]

    @staticmethod
    def _cut(tensor: Tensor, sizes: list[int] | None) -> Sequence[Tensor]:
        return (tensor,) if sizes is None else tensor.reshape(-1).split(sizes)


def _pick(parts: Sequence[Sequence[Tensor]], block: Block) -> list[Tensor]:
    return [parts[parameter][part] for parameter, part in block.members]


class _Adam:
    """The plain step of a block, with Adam's step number counted from where its rule begins."""

    def __init__(self, steps: list[Tensor], fused: bool, skip: Tensor | None) -> None:
        self._steps, self._fused, self._skip = steps, fused, skip
        self._late: dict[tuple[int, int], Tensor] = {}

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        block: Block,
        numbers: Hyperparameters,
    ) -> None:
        lr, decay, (beta1, beta2) = numbers.lr * block.rate, numbers.weight_decay, numbers.betas
        steps = [self._step(parameter, block.begins) for parameter, _ in block.members]
        if self._fused:
            step = torch._fused_adamw_ if decay else torch._fused_adam_
            step(
                *(weights, grads, first, second, [], steps),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=numbers.eps,
                weight_decay=decay,
                amsgrad=False,
                maximize=False,
                found_inf=self._skip,
            )
            return
        # The operations and their order are those of torch's `_single_tensor_adam`: another order rounds otherwise.
        if decay:
            torch._foreach_mul_(weights, 1 - lr * decay)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        counts = [float(step) for step in steps]
        denominators = torch._foreach_sqrt(second)
        torch._foreach_div_(denominators, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(denominators, numbers.eps)
        torch._foreach_addcdiv_(weights, first, denominators, [-lr / (1 - beta1**count) for count in counts])

    def _step(self, parameter: int, begins: int) -> Tensor:
        if not begins:
            return self._steps[parameter]
        # Bias correction divides by 1 - beta^t (arXiv 1412.6980, algorithm 1): t counts what the moments have seen.
        key = parameter, begins
        if key not in self._late:
            self._late[key] = self._steps[parameter] - begins
        return self._late[key]
