"""What lies in a rank's memory, term by term, under each ZeRO stage of DeepSpeed 0.19.

A term lives all the time, while gradients are made (`backward`), while they are reduced after that (`reduce`), during
both (`gradients`), or while the weights move (`step`); a rank needs what always lives and the greatest of the three
moments. W is the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Phase = Literal["always", "gradients", "backward", "reduce", "step"]

# DeepSpeed's defaults, in elements.
BUCKET = 500_000_000
MAX_LIVE = 1_000_000_000
# Without Triton a GPU steps blocks of so many elements; a CPU needs no room at all.
_STEP_BLOCK = 64 * 2**20


@dataclass(frozen=True)
class Counts:
    """Numbers (elements, not bytes) of a run."""

    trained: int
    """Of parameters that ask for a gradient."""
    frozen: int
    anchored: int
    """Of trained parameters that have a pretrained anchor; an adapter's anchor is zero and takes nothing."""
    whole: int
    """Of tensors so small that stage 3 keeps them whole on every rank."""
    without_gradient: int
    """Of trained parameters that no gradient reaches: they take memory like all trained ones."""
    anchor_bytes: int
    """Of each number of an anchor: as the checkpoint is stored, 2 under bf16."""


@dataclass(frozen=True)
class Setup:
    """How a run is sharded."""

    stage: int
    ranks: int
    precision: Literal["fp32", "bf16"]
    accumulation: int
    """Forward passes of an optimizer step."""
    fused: bool = True
    """Whether Adam runs as one kernel, or in passes that each make a temporary."""
    averaged: bool = False
    """Whether an average of the weights is kept (`training.ema`)."""
    offload: bool = False
    """Whether masters, moments, anchors and the step are on the host."""
    offload_weights: bool = False
    """Whether the shards of the weights are on the host; stage 3."""
    bucket: int = BUCKET
    """Elements that are reduced at once."""
    max_live: int = MAX_LIVE
    """Elements of whole weights at any time; stage 3."""
    lazy: bool = False
    """Whether untouched memory counts not at all, as on a CPU; a GPU's buffers count whole."""

    @property
    def bytes(self) -> int:
        """Of a weight."""
        return 2 if self.precision == "bf16" else 4

    @property
    def sum_bytes(self) -> int:
        """Of an element of the gradients that passes are added up in."""
        return 4 if self.precision == "fp32" or self.accumulation > 1 else 2


@dataclass(frozen=True)
class Term:
    """One thing in memory."""

    name: str
    bytes: int
    phase: Phase
    why: str
    host: bool = False
    """In the host's memory, not the device's."""


def terms(counts: Counts, setup: Setup, activations: int) -> list[Term]:
    """All terms of one rank.

    Args:
        counts: of the run.
        setup: how it is sharded.
        activations: most bytes of activations and temporaries of one forward and backward pass.
    """
    trained, ranks, size = counts.trained, setup.ranks, setup.bytes
    share = -(-trained // ranks)
    everything = trained + counts.frozen
    kept = everything if setup.stage < 3 else -(-everything // ranks) + counts.whole
    anchors = -(-counts.anchored // ranks) * counts.anchor_bytes
    off = setup.offload
    parts = [
        Term("weights", kept * size, "always", _WEIGHTS[setup.stage], setup.offload_weights),
        Term("masters", share * 4, "always", "fp32, 1/W of what is trained", off),
        Term("moments", share * 8, "always", "Adam's two, fp32, 1/W of what is trained", off),
        Term("anchors", anchors, "always", "pretrained weights, 1/W; adapters have none", off),
        Term("averaged weights", share * 4 if setup.averaged else 0, "always", "training.ema, fp32, 1/W", off),
        Term("snapshot", share * 12, "always", "masters and moments, from which checkpoints are written", True),
        Term("activations", activations, "backward", "kept for the gradients, and temporaries"),
    ]
    if setup.stage == 3:
        live = min(everything, setup.max_live) * size
        why = f"whole tensors in use, at most {setup.max_live:.0e} elements at once"
        parts.append(Term("gathered weights", live, "backward", why))
    return [*parts, *_gradients(counts, setup, share), *_step(setup, share, off)]


_WEIGHTS = {1: "whole on every rank", 2: "whole on every rank", 3: "1/W; tensors below 1e5 elements whole"}


def _gradients(counts: Counts, setup: Setup, share: int) -> list[Term]:
    """Gradients until the step, and the bucket through which they are reduced."""
    moving = counts.trained - counts.without_gradient
    filled = min(moving, setup.bucket)
    bucket = (filled if setup.lazy else setup.bucket) * setup.bytes
    room = f"{setup.bucket:.0e} elements"
    if setup.stage == 1 and setup.precision == "bf16" and setup.accumulation > 1:
        # DeepSpeed's BF16_Optimizer: fp32 sums of all gradients, beside those of the last pass.
        return [
            Term("gradients", counts.trained * 4, "always", "fp32 sums, whole on every rank"),
            Term("pass gradients", moving * 2, "backward", "bf16, whole, until they are added to the sums"),
        ]
    # Gradients that all fit into one bucket are reduced when activations are gone, before there are 1/W of sums.
    single = moving <= setup.bucket
    # DeepSpeed 0.19 flattens what it reduces of a bucket into a copy (`allreduce_bucket`), be it contiguous already.
    flattened = filled * setup.bytes
    why = "a copy of the bucket, which is what is reduced"
    if setup.stage == 1:
        # Reduced after the backward pass. On a CPU a gradient that moves into the bucket gives its own memory back.
        bucket = 0 if setup.lazy else bucket
        return [
            Term("gradients", moving * setup.bytes, "gradients", "whole on every rank until they are reduced"),
            Term("reduce bucket", bucket, "gradients", room),
            Term("flattened bucket", flattened, "reduce", why),
            Term(
                "own gradients", 0 if single else share * setup.sum_bytes, "reduce", "1/W, from buckets reduced before"
            ),
        ]
    if setup.stage == 2:
        # Offloaded, they go from the bucket to the host as they are reduced.
        alone = single and setup.accumulation == 1
        return [
            Term("gradients", 0 if alone else share * setup.sum_bytes, "gradients", "1/W", setup.offload),
            Term("reduce bucket", bucket, "gradients", room),
            Term("flattened bucket", flattened, "reduce" if single else "backward", why),
        ]
    return [
        Term("gradients", share * setup.sum_bytes, "always", "1/W, a buffer of its own", setup.offload),
        Term("reduce bucket", bucket, "always", room),
        Term("reduced bucket", filled * setup.sum_bytes, "backward", "what is sent of it, in the sums' precision"),
    ]


def _step(setup: Setup, share: int, off: bool) -> list[Term]:
    """What the optimizer step adds."""
    whole = setup.stage == 1 and setup.precision == "bf16" and setup.accumulation > 1
    held = 0 if setup.stage == 3 or whole else share * setup.sum_bytes
    flat = 0 if whole else share * 4
    temporaries = share * 8
    if setup.fused:
        temporaries = 0 if setup.lazy or off else min(share, _STEP_BLOCK) * 8
    return [
        Term("reduced gradients", held, "step", "1/W, until they are flat", off),
        Term("fp32 gradients", flat, "step", "flat, 1/W", off),
        Term("step temporaries", temporaries, "step", "of Adam and the projection", off),
    ]


def needed(terms: Iterable[Term], host: bool = False) -> int:
    """Bytes of a rank at its worst moment, on the device or on the host."""
    sums: dict[Phase, int] = {"always": 0, "gradients": 0, "backward": 0, "reduce": 0, "step": 0}
    for term in terms:
        if term.host == host:
            sums[term.phase] += term.bytes
    return sums["always"] + max(sums["gradients"] + max(sums["backward"], sums["reduce"]), sums["step"])
