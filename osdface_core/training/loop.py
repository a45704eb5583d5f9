"""The training loop of every task: devices, precision and processes by accelerate; logs, averaged
weights, checkpoints, samples.

A run that is stopped and resumed gives the same bits as one that is not: all that changes is in the
checkpoint, and what is random about a sample depends on the sample's number.
"""

from __future__ import annotations

import logging
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from PIL import Image
from torch import Tensor, nn

from ..cpu import has_bf16
from ..errors import OSDFaceError
from .data import Numbered, batches
from .losses import check_finite

log = logging.getLogger(__name__)

CHECKPOINT = "step_{:07d}.pt"


@dataclass(frozen=True)
class Run:
    """How long, where and in what precision is trained.

    A step sees batch x accumulate x processes samples.

    folder: where checkpoints, logs, samples and the result go.
    steps: optimisation steps in all.
    batch: samples that one process computes at a time.
    accumulate: batches whose gradients are added up to a step.
    seed: of new weights and of the samples.
    precision: of the autocast, no for fp32.
    cpu: trains on the processor even where there is a GPU.
    channels_last: memory format of networks and pictures; convolutions are faster in it.
    threads: of the processor; 0 leaves torch's own number.
    workers: processes that make samples, 0 for the training process itself.
    ema: decay of the exponential moving average of the weights, which is what is exported.
    ema_rise: the average's decay at step n, from 0, is at most (n + 1) / (n + 1 + ema_rise).
    log_every: steps between two lines of the log.
    sample_every: steps between two pictures of held-out samples.
    samples: how many of them are shown, 0 for none.
    checkpoint_every: steps between two checkpoints.
    keep: checkpoints that are kept.
    """

    folder: Path
    steps: int
    batch: int = 1
    accumulate: int = 1
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    cpu: bool = False
    channels_last: bool = False
    threads: int = 0
    workers: int = 2
    ema: float = 0.999
    ema_rise: int = 9
    log_every: int = 50
    sample_every: int = 1000
    samples: int = 6
    checkpoint_every: int = 1000
    keep: int = 2


@dataclass(frozen=True)
class Optimiser:
    """AdamW and its learning rate.

    learning_rate: the highest.
    betas: of the two moments.
    weight_decay: decoupled, as a share of the learning rate.
    eps: added to the root of the second moment.
    warmup: steps in which the rate rises linearly to learning_rate.
    schedule: constant, or a cosine that falls from step `hold` to the run's end.
    hold: steps before the cosine begins.
    end: where the cosine ends, as a share of learning_rate.
    halved_at: steps at each of which the rate is halved.
    clip: largest norm of a network's gradient, 0 for any.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    end: float = 0.0
    clip: float = 1.0
    hold: int = 0
    halved_at: tuple[int, ...] = ()

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step 0, 1, ... of `steps`."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        fall = 1.0
        if self.schedule == "cosine" and step > self.hold:
            fall = (1 + math.cos(math.pi * (step - self.hold) / (steps - self.hold))) / 2
        halvings = sum(step >= at for at in self.halved_at)
        return self.learning_rate * rise * (self.end + (1 - self.end) * fall) / 2**halvings


class Task(Protocol):
    """What is trained, on what, and with which losses.

    networks: by name. They take turns in this order on every batch. The loop moves them to their
        device and wraps them, so that `losses` must call them through `networks`, or through
        `bare(networks[...])` where their gradient is not wanted.
    optimisers: of each network, by the same names.
    samples: what is trained on.
    accelerator: from `accelerator_for`.
    step: steps done, which the loop counts.
    """

    networks: dict[str, nn.Module]
    optimisers: dict[str, Optimiser]
    samples: Numbered
    accelerator: Accelerator
    step: int

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of network `name` on a batch, and its parts for the log."""

    def after_step(self, step: int) -> None:
        """Called after step number `step`, counted from 1."""

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """A picture (3,H,W) in [0,1] of `count` held-out samples, and what was measured on all.

        Called with the averaged weights in place and the networks in evaluation mode.
        """

    def export(self, folder: Path) -> None:
        """Writes the files that inference reads. Called with the averaged weights in place."""


def accelerator_for(run: Run) -> Accelerator:
    """The accelerator of a run. Sets the seed, too, so it comes before new networks are made."""
    if run.threads:
        torch.set_num_threads(run.threads)
    accelerator = Accelerator(
        cpu=run.cpu,
        mixed_precision=run.precision,
        gradient_accumulation_steps=run.accumulate,
        log_with="tensorboard",
        project_dir=str(run.folder),
    )
    if run.precision == "bf16" and accelerator.device.type == "cpu" and not has_bf16():
        log.warning(
            "This processor has no instructions for bf16, which makes it many times slower: set "
            'run.precision="no".'
        )
    set_seed(run.seed)
    return accelerator


def bare(network: nn.Module) -> nn.Module:
    """The network without the wrapper of a run of several processes.

    Its forward still runs in the run's precision.
    """
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def trained(network: nn.Module) -> dict[str, Tensor]:
    """The tensors that training changes: parameters that are not frozen, and buffers."""
    found = {name: p.data for name, p in network.named_parameters() if p.requires_grad}
    return found | dict(network.named_buffers())


class Average:
    """Exponential moving average of the trained parameters and of the buffers of real numbers, such
    as the statistics of batch norm.

    The decay of step n is min(decay, (n + 1) / (n + 1 + rise)): at first the average forgets its
    untrained beginning fast.
    """

    def __init__(self, network: nn.Module, decay: float, rise: int) -> None:
        self.live = [t for t in trained(network).values() if t.is_floating_point()]
        self.kept = [t.detach().clone().float() for t in self.live]
        self.decay, self.rise = decay, rise

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (1 + step + self.rise))
        torch._foreach_lerp_(self.kept, [t.float() for t in self.live], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The network has the averaged weights within, its own again afterwards."""
        before = [t.clone() for t in self.live]
        for live, average in zip(self.live, self.kept, strict=True):
            live.copy_(average)
        try:
            yield
        finally:
            for live, own in zip(self.live, before, strict=True):
                live.copy_(own)


def train(task: Task, run: Run, configuration: str) -> None:
    """Trains from the last checkpoint in `run.folder`, or from the beginning where there is none.

    configuration: is written to config.yaml in that folder.

    Raises OSDFaceError for a checkpoint of another configuration, before anything is written, and
    for a loss that is not finite.
    """
    accelerator = task.accelerator
    own = {name: bare(network) for name, network in task.networks.items()}
    flags = {name: [p.requires_grad for p in network.parameters()] for name, network in own.items()}
    layout = torch.channels_last if run.channels_last else torch.preserve_format
    optimisers = {}
    for name, network in own.items():
        if run.channels_last:
            network.to(memory_format=layout)
        settings = task.optimisers[name]
        made = torch.optim.AdamW(
            [p for p in network.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.eps,
        )
        task.networks[name], optimisers[name] = accelerator.prepare(network, made)
        network.train()
    averages = {name: Average(network, run.ema, run.ema_rise) for name, network in own.items()}
    task.step = step = _resume(run, accelerator, own, optimisers, averages)
    if accelerator.is_main_process:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "config.yaml").write_text(configuration, encoding="utf-8")
    accelerator.init_trackers("log")
    count = sum(
        p.numel() for network in own.values() for p in network.parameters() if p.requires_grad
    )
    seen = run.batch * run.accumulate * accelerator.num_processes
    log.info(
        "%d pictures, %.2f million weights to train, %d samples a step",
        len(task.samples),
        count / 1e6,
        seen,
    )
    log.info(
        "From step %d to %d on %s in %s",
        step,
        run.steps,
        accelerator.device,
        run.precision.replace("no", "fp32"),
    )
    feed = batches(
        task.samples,
        batch=run.batch,
        accumulate=run.accumulate,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        first_step=step,
        workers=run.workers,
    )
    sums: dict[str, Tensor] = {}
    begun, begun_at = time.monotonic(), step
    while step < run.steps:
        for name, optimiser in optimisers.items():
            for group in optimiser.param_groups:
                group["lr"] = task.optimisers[name].rate(step, run.steps)
        for _ in range(run.accumulate):
            batch = {
                key: value.to(
                    accelerator.device,
                    memory_format=layout if value.ndim == 4 else torch.preserve_format,
                )
                for key, value in next(feed).items()
            }
            with accelerator.accumulate(*task.networks.values()):
                for name in task.networks:
                    for other, network in own.items():
                        for p, flag in zip(network.parameters(), flags[other], strict=True):
                            p.requires_grad_(flag and other == name)
                    total, parts = task.losses(name, batch)
                    accelerator.backward(total)
                    if accelerator.sync_gradients and task.optimisers[name].clip:
                        accelerator.clip_grad_norm_(
                            task.networks[name].parameters(), task.optimisers[name].clip
                        )
                    optimisers[name].step()
                    optimisers[name].zero_grad()
                    for key, value in parts.items():
                        sums[key] = sums.get(key, 0) + value.detach().float() / run.accumulate
        for name, network in own.items():
            for p, flag in zip(network.parameters(), flags[name], strict=True):
                p.requires_grad_(flag)
        task.step = step = step + 1
        task.after_step(step)
        for average in averages.values():
            average.update(step)
        last = step == run.steps
        if step % run.log_every == 0 or last:
            since = (step - 1) % run.log_every + 1
            means = {
                key: float(accelerator.reduce(value, "mean")) / min(since, step - begun_at)
                for key, value in sums.items()
            }
            check_finite(means, step)
            sums = {}
            speed = (step - begun_at) / (time.monotonic() - begun)
            rates = {
                f"rate/{name}": settings.rate(step - 1, run.steps)
                for name, settings in task.optimisers.items()
            }
            accelerator.log(means | rates | {"steps_a_second": speed}, step=step)
            log.info(
                "step %d: %s, %.2f steps/s",
                step,
                ", ".join(f"{key} {value:.4g}" for key, value in means.items()),
                speed,
            )
        if run.samples and (step % run.sample_every == 0 or last):
            _show(task, run, own, averages, step)
        if step % run.checkpoint_every == 0 or last:
            _save(run, accelerator, step, own, optimisers, averages)
    if accelerator.is_main_process:
        with _averaged(averages):
            task.export(run.folder)
        log.info("Written to %s", run.folder)
    accelerator.wait_for_everyone()
    accelerator.end_training()


@contextmanager
def _averaged(averages: dict[str, Average]) -> Iterator[None]:
    with ExitStack() as stack:
        for average in averages.values():
            stack.enter_context(average.in_place())
        yield


def _show(
    task: Task,
    run: Run,
    own: dict[str, nn.Module],
    averages: dict[str, Average],
    step: int,
) -> None:
    """Writes and logs held-out samples."""
    if task.accelerator.is_main_process:
        for network in own.values():
            network.eval()
        with torch.no_grad(), _averaged(averages):
            picture, measured = task.show(run.samples)
        for network in own.values():
            network.train()
        pixels = picture.clamp(0, 1).mul(255).round().byte().cpu()
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels.movedim(0, -1).numpy()).save(folder / f"{step:07d}.png")
        if tracker := task.accelerator.get_tracker("tensorboard", unwrap=True):
            tracker.add_image("samples", pixels, step)
        task.accelerator.log(
            {f"held_out/{key}": value for key, value in measured.items()}, step=step
        )
        log.info(
            "step %d, held out: %s",
            step,
            ", ".join(f"{key} {value:.3f}" for key, value in measured.items()),
        )
    task.accelerator.wait_for_everyone()


def _randomness() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": [v.tolist() if isinstance(v, np.ndarray) else v for v in np.random.get_state()],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_randomness(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(folder.glob("step_*.pt"))


def _save(
    run: Run,
    accelerator: Accelerator,
    step: int,
    own: dict[str, nn.Module],
    optimisers: dict[str, Any],
    averages: dict[str, Average],
) -> None:
    randomness = gather_object([_randomness()])
    if accelerator.is_main_process:
        state = {
            "step": step,
            "processes": accelerator.num_processes,
            "networks": {name: trained(network) for name, network in own.items()},
            "optimisers": {name: optimiser.state_dict() for name, optimiser in optimisers.items()},
            "averages": {name: average.kept for name, average in averages.items()},
            "randomness": randomness,
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        path = run.folder / CHECKPOINT.format(step)
        torch.save(state, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        for old in checkpoints(run.folder)[: -run.keep]:
            old.unlink()
    accelerator.wait_for_everyone()


def _resume(
    run: Run,
    accelerator: Accelerator,
    own: dict[str, nn.Module],
    optimisers: dict[str, Any],
    averages: dict[str, Average],
) -> int:
    """Puts the last checkpoint in place, if there is one. Returns the number of steps done."""
    if not (found := checkpoints(run.folder)):
        return 0
    try:
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
        for name, network in own.items():
            places = trained(network)
            if places.keys() != state["networks"][name].keys():
                raise KeyError(f"other weights in {name}")
            for key, place in places.items():
                place.copy_(state["networks"][name][key])
            optimisers[name].load_state_dict(state["optimisers"][name])
            for kept, value in zip(averages[name].kept, state["averages"][name], strict=True):
                kept.copy_(value)
    except (KeyError, ValueError, RuntimeError, EOFError) as error:
        raise OSDFaceError(
            f"{found[-1]} is no checkpoint of this configuration "
            f"({' '.join(str(error).split())[:200]}): give another run.folder."
        ) from error
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.num_processes == len(state["randomness"]):
        _set_randomness(state["randomness"][accelerator.process_index])
    log.info("Going on from %s", found[-1])
    return int(state["step"])


def grid(rows: list[Tensor]) -> Tensor:
    """Rows of pictures (B,3,H,W) as one picture (3,rows x H,B x W)."""
    return torch.cat([torch.cat(list(row.float().cpu()), dim=-1) for row in rows], dim=-2)


def for_file(state: dict[str, Tensor], *, half: bool = False) -> dict[str, Tensor]:
    """The tensors as safetensors takes them. half: real numbers as fp16."""
    return {
        name: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous()
        for name, t in state.items()
    }
