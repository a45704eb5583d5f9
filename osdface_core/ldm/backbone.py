"""The UNet and autoencoder of this room as the core's Backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import autocast

from ..chunks import is_out_of_memory
from ..cpu import exact, optimized
from ..devices import VALUES_PER_FACE, best_device, best_dtype, max_batch
from ..sd21.adapters import Lora
from ..sd21.backbone import SIDE
from ..sd21.base_model import REMEDY, SCALING
from ..sd21.schedule import x0_of
from .loading import SD21, Shapes, Tensors, add_lora, check_tensors, load, read
from .networks import UNet


class LdmBackbone:
    """A UNet and an autoencoder of layers that cast as the core's Backbone.

    Tensors that come back are fp32, on the device. Weights that are the backbone's own are moved to
    the device and type; those of another program are neither moved nor written to, and are brought
    to the device and type a layer at a time if they are elsewhere.

    unet: predicts epsilon on Stable Diffusion's schedule.
    autoencoder: of the same layers; `encode` and `decode` as in this room's Autoencoder.
    device: to compute on; the best there is, if None.
    dtype: to compute in; the best for the device, if None.
    owned: whether the weights are the backbone's own.
    scaling: of the latents.
    """

    def __init__(
        self,
        unet: UNet,
        autoencoder: nn.Module,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        owned: bool = True,
        scaling: float = SCALING,
    ) -> None:
        self.unet = unet
        self.autoencoder: Any = autoencoder
        self.scaling = scaling
        self.owned = owned
        self.device = device or best_device()
        self.dtype = dtype or best_dtype(self.device)
        if owned:
            for network in (unet, autoencoder):
                network.to(dtype=self.dtype)
            self.place(self.device)

    @classmethod
    def from_file(
        cls,
        path: Path,
        lora: Lora | None = None,
        strength: float = 1.0,
        *,
        lora_name: str = "the LoRA",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        shapes: Shapes = SD21,
    ) -> LdmBackbone:
        """The backbone of a checkpoint or a folder in diffusers' layout, with a LoRA on its UNet.

        Nothing but UNet and autoencoder is read. Raises OSDFaceError for anything but Stable
        Diffusion 2.1-base or a fine-tune of it, and for a LoRA that does not fit.

        path: the file (safetensors or ckpt) or folder.
        lora: merged into the UNet's weights.
        strength: factor of the LoRA.
        lora_name: for errors.
        device: the best there is, if None.
        dtype: the best for the device, if None.
        shapes: of the networks.
        """
        unet, autoencoder = load(*read(path, shapes), path.name, shapes)
        if lora is not None and strength:
            add_lora(unet, lora, strength, lora_name, merge=True)
        return cls(unet, autoencoder, device=device, dtype=dtype)

    @classmethod
    def from_tensors(
        cls,
        unet: Tensors,
        autoencoder: Tensors,
        source: str,
        lora: Lora | None = None,
        strength: float = 1.0,
        *,
        lora_name: str = "the LoRA",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        shapes: Shapes = SD21,
        remedy: str = REMEDY,
    ) -> LdmBackbone:
        """The backbone of tensors that another program holds, without a copy of them.

        They are never written to: the LoRA is merged with each weight whenever its layer is called.
        Raises OSDFaceError for anything but Stable Diffusion 2.1-base or a fine-tune of it, and for
        a LoRA that does not fit.

        unet: by LDM names, such as `dict(module.named_parameters())`. Parameters are kept as they
            are, so that the backbone follows where the program moves them; of other tensors what
            is given now is kept alive.
        autoencoder: likewise.
        source: what it is, such as the checkpoint's name, for errors.
        lora: added to the UNet.
        strength: factor of the LoRA.
        lora_name: for errors.
        device: to compute on; the best there is, if None.
        dtype: to compute in; the best for the device, if None.
        shapes: of the networks.
        remedy: the end of an error's sentence.
        """
        check_tensors(unet, autoencoder, source, remedy)
        networks = load(unet, autoencoder, source, shapes, remedy)
        if lora is not None and strength:
            add_lora(networks[0], lora, strength, lora_name, merge=False)
        return cls(*networks, device=device, dtype=dtype, owned=False)

    def place(self, device: torch.device) -> None:
        """Moves the backbone's own weights to where they are kept.

        Wherever that is, the backbone computes on its `device`. Weights of another program stay.
        """
        if not self.owned:
            return
        for network in (self.unet, self.autoencoder):
            network.to(device=device, memory_format=self.order)  # type: ignore[call-overload]

    @property
    def nbytes(self) -> int:
        """Bytes of the backbone's own weights."""
        networks = (self.unet, self.autoencoder) if self.owned else ()
        return sum(p.numel() * p.element_size() for n in networks for p in n.parameters())

    @property
    def order(self) -> torch.memory_format:
        # torch's group norm on the CPU loses four digits in channels-last order, which only fp32
        # has to lose: bf16 has three.
        is_exact = self.device.type == "cpu" and self.dtype == torch.float32
        return torch.contiguous_format if is_exact else torch.channels_last

    @contextmanager
    def fp32_fallback(self) -> Iterator[bool]:
        """A context in which everything computes in fp32. Gives whether it did not before.

        The weights stay as they are, and each is cast when its layer is called.
        """
        dtype = self.dtype
        self.dtype = torch.float32
        try:
            yield dtype != torch.float32
        finally:
            self.dtype = dtype

    def _given(self, tensor: Tensor) -> Tensor:
        order = self.order if tensor.ndim == 4 else torch.contiguous_format
        return tensor.to(device=self.device, dtype=self.dtype).contiguous(memory_format=order)

    def _as_asked(self) -> AbstractContextManager[object]:
        """A context in which a host's autocast does not change the type that is computed in."""
        if self.device.type not in ("cpu", "cuda", "xpu"):
            return nullcontext()
        return autocast(self.device.type, enabled=False)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        with optimized(self.device, self.autoencoder), self._as_asked():
            return self.autoencoder.encode(self._given(pixels * 2 - 1)).float() * self.scaling

    @exact()
    @torch.no_grad()
    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        with self._as_asked():
            noise = self.unet(self._given(latents), timestep, self._given(prompts))
        # In fp64, which Apple's MPS does not have.
        where = torch.device("cpu") if self.device.type == "mps" else self.device
        return x0_of(latents.to(where), noise.to(where, torch.float32), timestep)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with optimized(self.device, self.autoencoder), self._as_asked():
            pixels = self.autoencoder.decode(self._given(latents / self.scaling))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def max_batch(self, height: int, width: int) -> int:
        values = VALUES_PER_FACE * height * width / SIDE**2
        return max_batch(self.device, self.dtype, values)

    def out_of_memory(self, error: BaseException) -> bool:
        return is_out_of_memory(error)
