"""The built-in autoencoder, trained to give its input back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from ..osdface.builtin.autoencoder import Autoencoder
from .data import Pictures, read_square, training_and_held_out
from .degradation import Degradation
from .loop import Optimiser, Run, bare, for_file, grid
from .losses import differences, mean_of_each, measures
from .networks import load_autoencoder

# Of the training pictures, one in so many is used for the principal components.
ANALYSED = 4


@dataclass(frozen=True)
class AutoencoderConfig:
    """What `configs/autoencoder_builtin.yaml` holds.

    start: an exported file to go on from; without one the linear paths begin at the principal
        components of the pictures.
    degradation: of the pictures that are encoded and decoded. A degraded face goes through the same
        encoder as a good one.
    """

    run: Run
    data: Pictures
    optimiser: Optimiser
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
        self.networks: dict[str, nn.Module] = {"autoencoder": network}
        self.optimisers = {"autoencoder": config.optimiser}

    def losses(self, name: str, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean absolute error of the pixels and of their differences, of pictures in [-1,1]."""
        pictures = batch["lq"] * 2 - 1
        decoded = self.networks[name](pictures).float()
        parts = {
            "l1": (decoded - pictures).abs().mean(),
            "differences": differences(decoded, pictures),
        }
        total = parts["l1"] + parts["differences"]
        return total, parts | {"total": total}

    def after_step(self, step: int) -> None:
        pass

    def show(self, count: int) -> tuple[Tensor, dict[str, float]]:
        """Rows: original, decoded."""
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
        state = bare(self.networks["autoencoder"]).state_dict()
        save_file(for_file(state, half=True), folder / "autoencoder.safetensors")
