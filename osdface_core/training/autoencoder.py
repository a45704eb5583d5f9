"""The built-in autoencoder, trained to give its input back, and its denoiser, trained by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..osdface.builtin.autoencoder import QUARTER, Autoencoder
from .data import Pictures, read_square, training_and_held_out
from .degradation import Degradation
from .loop import Optimiser, Run, bare, for_file, grid
from .losses import differences, mean_of_each, measures
from .networks import load_autoencoder
from .samples import show_restored

# Of the training pictures, one in so many is used for the principal components.
ANALYSED = 4
# Added to a degraded picture's mean squared error before the denoiser's is divided by it; without
# it, pictures that are hardly degraded would count the most.
SLIGHT = 1e-3


@dataclass(frozen=True)
class AutoencoderConfig:
    """What `configs/autoencoder_builtin.yaml` and `autoencoder_builtin_denoiser.yaml` hold.

    part: all, but for the encoder's denoiser; or denoiser, that alone, which learns from degraded
        pictures what good ones are at a quarter of the size.
    model_size: for the denoiser: pixels a side at which the model will get the pictures that are
        `data.size` here, which may be smaller, since they are pooled.
    start: an exported file to go on from; without one the linear paths begin at the principal
        components of the pictures, and the denoiser changes nothing.
    degradation: of the pictures that are encoded and decoded. A degraded face goes through the same
        encoder as a good one.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
    part: Literal["all", "denoiser"] = "all"
    model_size: int = 512
    start: Path | None = None
    degradation: Degradation = field(default_factory=lambda: Degradation(()))


class AutoencoderTask:
    def __init__(self, config: AutoencoderConfig, accelerator: Accelerator) -> None:
        self.accelerator, self.step = accelerator, 0
        self.samples, self.held_out = training_and_held_out(
            config.data, config.degradation, config.run.seed, config.run.samples, with_face=False
        )
        network = load_autoencoder(config.start) if config.start else Autoencoder()
        if not config.start:
            analysed = [read_square(f, config.data.size) for f in self.samples.files[::ANALYSED]]
            network.start(torch.stack(analysed).float() / 127.5 - 1)
        self.network = network
        self.networks: dict[str, nn.Module] = {"autoencoder": network}
        # The autoencoder's loss asks for noise back; the denoiser must not learn that.
        network.encoder.denoiser.requires_grad_(config.part == "denoiser")
        if config.part == "denoiser":
            quarter, rest = divmod(config.model_size, QUARTER)
            if rest or quarter < 1 or config.data.size % quarter:
                raise OSDFaceError(
                    f"`data.size` is {config.data.size} and `model_size` {config.model_size}; a "
                    f"multiple of {QUARTER}, and one of its quarter for data.size, are wanted: "
                    "set them."
                )
            if not config.start:
                raise OSDFaceError(
                    "`start` is not given, so that the denoiser would stand in an autoencoder "
                    "without training: give an exported autoencoder.safetensors."
                )
            self.pool = config.data.size // quarter
            self.networks = {"denoiser": network.encoder.denoiser}
        self.optimisers = dict.fromkeys(self.networks, config.optimiser)

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the autoencoder: mean absolute error of the pixels and of their differences, of
        pictures in [-1,1]. Of the denoiser: mean squared error as a share of the degraded
        picture's, at a quarter of the size.
        """
        if name == "denoiser":
            bad, good = self._pooled(batch["lq"]), self._pooled(batch["hq"])
            error = (bad + self.networks[name](bad).float() - good).square().mean((1, 2, 3))
            # In [-1,1] a squared error is four times what it is in [0,1].
            share = error / (4 * SLIGHT + (bad - good).square().mean((1, 2, 3)))
            return share.mean(), {"share": share.mean(), "total": share.mean()}
        pictures = batch["lq"] * 2 - 1
        decoded = self.networks[name](pictures).float()
        parts = {
            "l1": (decoded - pictures).abs().mean(),
            "differences": differences(decoded, pictures),
        }
        total = parts["l1"] + parts["differences"]
        return total, parts | {"total": total}

    def _pooled(self, pictures: Tensor) -> Tensor:
        """(B,3,h,w) in [0,1] -> what the denoiser sees of it, in [-1,1]."""
        return F.avg_pool2d(pictures * 2 - 1, self.pool)

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Rows: original, decoded; of the denoiser degraded, denoised, original."""
        if "denoiser" in self.networks:
            denoiser = bare(self.networks["denoiser"])

            def denoised(sample: dict[str, Tensor]) -> Tensor:
                change = denoiser(self._pooled(sample["lq"])).float() / 2
                return sample["lq"] + F.interpolate(change, scale_factor=self.pool, mode="bilinear")

            return show_restored(denoised, self.held_out, count, self.accelerator.device)
        network = bare(self.networks["autoencoder"])
        rows: list[list[Tensor]] = [[], []]
        figures = []
        for n in range(len(self.held_out)):
            picture = self.held_out[n]["hq"][None].to(self.accelerator.device)
            decoded = (network(picture * 2 - 1).float() + 1) / 2
            figures.append(measures(decoded, picture))
            if n < count:
                for row, shown in zip(rows, (picture, decoded), strict=True):
                    row.append(shown)
        return grid([torch.cat(row) for row in rows]), mean_of_each(figures)

    def export(self, folder: Path) -> None:
        """autoencoder.safetensors, in fp16, as the built-in model reads it."""
        state = self.network.state_dict()
        save_file(for_file(state, half=True), folder / "autoencoder.safetensors")
