"""Pretrains the tiny OpenVLA-OFT on grounded language and writes it as a checkpoint folder."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn

from maps_ray.files import replaced
from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.openvla_oft.checkpoint import create_policy, load_policy, save_policy
from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.openvla_oft.tiny import build_tokenizer, tiny_config, tiny_preprocessor_config
from tiny_base.batches import Batch, Vocabulary, make_batch
from tiny_base.objective import (
    Losses,
    MiddleStates,
    Score,
    alignment_losses,
    constant_scores,
    evaluate,
    losses,
)
from tiny_base.questions import templates
from tiny_base.scenes import Scenes, read_scenes

# Every third step shows two pictures, as fine-tuning does, and half as many inputs.
_TWO_PICTURES_EVERY = 3
# The pictures of a step are cut into parts, one for each thread: threads then meet once in a step, not at every
# operation, and the result depends on the number of parts alone.
_PARTS = 2
_DECAY = 0.4
_EVALUATED = 400
_EVALUATION_SEED = 1


@dataclass(frozen=True)
class Options:
    """One pretraining run."""

    scenes: Path
    """Folder that `jobs/render_scenes.py` made."""
    work: Path
    """Folder for the log and the checkpoint to resume from."""
    out: Path
    """Checkpoint folder to write; must not exist or be empty."""
    steps: int
    alignment_steps: int = 600
    """First so many steps only teach towers and projector to name patches, which costs a quarter of a full step."""
    batch_size: int = 16
    """Pictures in a step."""
    questions: int = 2
    """Questions for each picture."""
    threads: int = 2
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
    checkpoint_every: int = 100
    held_out: float = 0.05
    seed: int = 0


def pretrain(options: Options) -> dict[str, object]:
    """Runs or resumes pretraining, and writes the checkpoint folder in bf16.

    `work/log.jsonl` gets one line for each step, and `work/state.pt` is replaced every `checkpoint_every` steps.
    Batches depend on seed and step alone, so a resumed run ends with the weights of one that was never interrupted.

    Returns:
        The log's last line: steps, seconds, pictures, and loss and scores on held-out pictures before and after.

    Raises:
        SceneError: no usable scenes.
        CheckpointError: `out` exists and is not empty.
    """
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise CheckpointError(f"{options.out} exists already; choose another folder or remove it")
    scenes = read_scenes(options.scenes, held_out=options.held_out)
    tokenizer = build_tokenizer([*templates(), *scenes.names])
    vocabulary = Vocabulary(tokenizer, scenes.names)
    policy = create_policy(tiny_config(), seed=options.seed)
    for tower in (policy.vision_backbone.featurizer, policy.vision_backbone.fused_featurizer):
        tower.pos_embed.data.copy_(_sine_cosine(tower.pos_embed.shape[1], tower.pos_embed.shape[2]))
    held_out = list(held_out_batches(scenes, vocabulary, policy))
    options.work.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    try:
        run = _Run(options, scenes, vocabulary, policy)
        before = run.before or _report(policy, held_out, vocabulary)
        run.train(before)
    finally:
        torch.set_num_threads(threads)
    _write(policy, options.out, tokenizer)
    summary = {
        "steps": options.steps,
        "seconds": round(run.seconds),
        "pictures": len(scenes.train),
        "held_out_pictures": len(scenes.held_out),
        "constant": _rounded(constant_scores(held_out)),
        "before": before,
        "after": _report(load_policy(options.out), held_out, vocabulary),
    }
    with run.log.open("a") as log:
        log.write(json.dumps(summary) + "\n")
    return summary


def held_out_batches(
    scenes: Scenes, vocabulary: Vocabulary, policy: OpenVLAOFT, questions_each: int = 4
) -> Iterator[Batch]:
    """Fixed questions about whole held-out pictures; those that have a wrist view show both."""
    random = np.random.default_rng(_EVALUATION_SEED)
    kept = set(scenes.held_out)
    wanted = random.permutation(scenes.held_out)[:_EVALUATED].tolist()
    paired = [row for row in wanted if scenes.pictures[row].partner in kept]
    alone = [row for row in wanted if scenes.pictures[row].partner is None]
    for second, rows in ((False, alone), (True, paired)):
        for start in range(0, len(rows), 20):
            chosen = rows[start : start + 20]
            yield _batch(scenes, vocabulary, policy, chosen, random, questions_each, second, augment=False)


class _Run:
    """The optimisation, from its last checkpoint on."""

    def __init__(self, options: Options, scenes: Scenes, vocabulary: Vocabulary, policy: OpenVLAOFT) -> None:
        self._options = options
        self._scenes = scenes
        self._vocabulary = vocabulary
        self._middle = MiddleStates()
        self._policy = policy
        # The head is learned by fine-tuning.
        self._trained = [value for name, value in policy.named_parameters() if not name.startswith("action_head.")]
        groups: list[dict[str, object]] = [
            {"params": [value for value in self._trained if value.ndim > 1]},
            {"params": [value for value in self._trained if value.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=options.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=options.weight_decay,
        )
        self._state = options.work / "state.pt"
        self.log = options.work / "log.jsonl"
        self._step = 0
        self.seconds = 0.0
        self.before: dict[str, object] | None = None
        if self._state.exists():
            self._resume()

    def train(self, before: dict[str, object]) -> None:
        """Goes through the remaining steps; `before` is kept in the checkpoints."""
        options = self._options
        self._policy.train()
        began = time.monotonic() - self.seconds
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
        )
        pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))
        watching = MiddleStates.of(self._policy)
        with pool, watching as self._middle, Progress(*columns) as bar, self.log.open("a", buffering=1) as log:
            task = bar.add_task("pretraining", total=options.steps, completed=self._step, values="")
            while self._step < options.steps:
                line = self._take_step(pool)
                self.seconds = time.monotonic() - began
                log.write(json.dumps({**line, "seconds": round(self.seconds, 1)}) + "\n")
                bar.update(task, completed=self._step, values=f"loss {line['total']:.3f}")
                if self._step % options.checkpoint_every == 0 or self._step == options.steps:
                    self._checkpoint(before)

    def _take_step(self, pool: ThreadPoolExecutor) -> dict[str, float]:
        if self._step == self._options.alignment_steps:
            # Image tokens look like the head's rows of what they show by now; words of a prompt begin the same.
            language = self._policy.language_model
            language.model.embed_tokens.weight.data.copy_(language.lm_head.weight.data)
        rate = _learning_rate(self._step, self._options)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        parts = list(pool.map(self._part, range(_PARTS)))
        for index, parameter in enumerate(self._trained):
            found = [gradient for _, gradients in parts if (gradient := gradients[index]) is not None]
            parameter.grad = torch.stack(found).mean(dim=0) if found else None
        norm = nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self._step += 1
        means = [float(torch.stack(values).mean()) for values in zip(*(loss for loss, _ in parts), strict=True)]
        line = {key: round(value, 5) for key, value in zip(Losses._fields, means, strict=True)}
        return {"step": self._step, **line, "norm": round(float(norm), 4), "lr": rate}

    def _part(self, part: int) -> tuple[Losses, tuple[Tensor | None, ...]]:
        """Losses and gradients of one part of the next step."""
        batch = self._draw(part)
        if self._step < self._options.alignment_steps:
            result = alignment_losses(self._policy, batch, self._vocabulary)
        else:
            result = losses(self._policy, batch, self._vocabulary, self._middle)
        # What alignment does not reach, and what comes after the towers' last block but one, has no gradient.
        gradients = torch.autograd.grad(result.total, self._trained, allow_unused=True)
        return Losses(*(value.detach() for value in result)), gradients

    def _draw(self, part: int) -> Batch:
        random = np.random.default_rng([self._options.seed, self._step, part])
        rows = list(self._scenes.train)
        size = max(1, self._options.batch_size // _PARTS)
        paired = [row for row in rows if self._scenes.pictures[row].partner is not None]
        second = bool(paired) and self._step % _TWO_PICTURES_EVERY == _TWO_PICTURES_EVERY - 1
        if second:
            rows, size = paired, max(1, size // 2)
        chosen = random.choice(rows, size=size, replace=len(rows) < size).tolist()
        each = self._options.questions
        return _batch(self._scenes, self._vocabulary, self._policy, chosen, random, each, second, augment=True)

    def _checkpoint(self, before: dict[str, object]) -> None:
        state = {
            "policy": self._policy.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self._step,
            "seconds": self.seconds,
            "before": before,
        }
        with replaced(self._state) as partial:
            torch.save(state, partial)

    def _resume(self) -> None:
        state = torch.load(self._state, weights_only=True)
        self._policy.load_state_dict(state["policy"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._step, self.seconds, self.before = state["step"], state["seconds"], state["before"]
        # Steps after the checkpoint are taken again.
        lines = self.log.read_text().splitlines(keepends=True)
        self.log.write_text("".join(lines[: self._step]))


def _sine_cosine(positions: int, width: int) -> Tensor:
    """Position embeddings (1, positions, width) of a square grid that towers start from (Chen et al. 2021, MoCo v3)."""
    side = round(positions**0.5)
    angles = torch.arange(side)[:, None] / 100 ** (torch.arange(width // 4) / (width // 4))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis.repeat_interleave(side, dim=0), axis.repeat(side, 1)
    return 0.5 * torch.cat([rows, columns], dim=1)[None]


def _learning_rate(step: int, options: Options) -> float:
    """Linear warm-up (again when the language model joins), constant, then linear to zero.

    Until the decay begins it does not depend on how many steps there are, so a run can be resumed with more or fewer.
    """
    begun = step - options.alignment_steps if step >= options.alignment_steps else step
    warm = (begun + 1) / max(1, options.warmup_steps)
    left = (options.steps - step) / max(1, _DECAY * options.steps)
    return options.learning_rate * min(1.0, warm, left)


def _batch(
    scenes: Scenes,
    vocabulary: Vocabulary,
    policy: OpenVLAOFT,
    rows: list[int],
    random: np.random.Generator,
    questions_each: int,
    second: bool,
    augment: bool,
) -> Batch:
    return make_batch(
        scenes,
        vocabulary,
        rows,
        random,
        image_size=policy.config.image_size,
        patch_size=policy.config.dinov2.patch_size,
        questions_each=questions_each,
        second=second,
        augment=augment,
    )


def _report(policy: OpenVLAOFT, batches: list[Batch], vocabulary: Vocabulary) -> dict[str, object]:
    result = evaluate(policy.eval(), batches, vocabulary)
    return {
        "answer_loss": round(result.answer_loss, 4),
        "naming": round(result.naming, 4),
        "pointing": round(result.pointing, 4),
        "questions": _rounded(result.scores),
    }


def _rounded(scores: dict[str, Score]) -> dict[str, dict[str, float | None]]:
    return {
        kind: {key: round(value, 4) if value is not None else None for key, value in asdict(score).items()}
        for kind, score in scores.items()
    }


def _write(policy: OpenVLAOFT, out: Path, tokenizer: Tokenizer) -> None:
    # The head is learned by fine-tuning: a base brings none.
    state = {name: tensor for name, tensor in policy.state_dict().items() if not name.startswith("action_head.")}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        (base / "config.json").write_text(json.dumps(tiny_config()))
        (base / "preprocessor_config.json").write_text(json.dumps(tiny_preprocessor_config(), indent=2) + "\n")
        tokenizer.save(str(base / "tokenizer.json"))
        save_policy(state, base, out, dtype=torch.bfloat16)
