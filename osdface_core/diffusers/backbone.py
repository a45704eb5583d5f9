"""A UNet and an autoencoder of diffusers as the core's Backbone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..chunks import is_out_of_memory
from ..cpu import exact, optimized
from ..devices import VALUES_PER_FACE, best_device, best_dtype, max_batch
from ..errors import OSDFaceError
from ..sd21.adapters import Lora
from ..sd21.backbone import LATENT_CHANNELS, SIDE
from ..sd21.base_model import check_unet
from ..sd21.schedule import x0_of
from .loading import Autoencoder, UNet, load
from .lora import merge_lora


class DiffusersBackbone:
    """A UNet2DConditionModel and an autoencoder of diffusers as the core's Backbone.

    Both networks are moved to the device and type, and stay there. Tensors that come back are fp32,
    on that device. Raises OSDFaceError for other networks.

    unet: predicts epsilon on Stable Diffusion's schedule.
    vae: AutoencoderKL or AutoencoderTiny.
    device: the best there is, if None.
    dtype: the best for the device, if None.
    channels: of the latents.
    """

    def __init__(
        self,
        unet: UNet,
        vae: Autoencoder,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        channels: int = LATENT_CHANNELS,
    ) -> None:
        self.unet = unet.eval()
        self.vae = vae.eval()
        check_unet(self.unet.config, "The UNet", channels=channels)
        self.scaling = float(self.vae.config.scaling_factor)
        self.device = device or best_device()
        self.to(dtype or best_dtype(self.device))

    @classmethod
    def from_files(
        cls,
        model: Path,
        lora: Lora | None = None,
        strength: float = 1.0,
        *,
        lora_name: str = "the LoRA",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> DiffusersBackbone:
        """The backbone of a folder or a checkpoint, as `load` reads it, with a LoRA on its UNet.

        Raises OSDFaceError as `load` and `merge_lora` do.

        model: the folder or file.
        lora: merged into the UNet.
        strength: factor of the LoRA.
        lora_name: for errors.
        device: the best there is, if None.
        dtype: the best for the device, if None.
        """
        unet, vae = load(model)
        if lora is not None and strength:
            merge_lora(unet, lora, strength, lora_name)
        return cls(unet, vae, device=device, dtype=dtype)

    def to(self, dtype: torch.dtype) -> None:
        """Moves both networks to the device, in `dtype`, in which they compute from now on."""
        self.dtype = dtype
        # torch's group norm on the CPU loses four digits in channels-last order, which only fp32
        # has to lose: bf16 has three.
        self.order = (
            torch.contiguous_format
            if self.device.type == "cpu" and dtype == torch.float32
            else torch.channels_last
        )
        for network in (self.unet, self.vae):
            # Not the network's own `to`: diffusers' warns of fp16 on a CPU.
            nn.Module.to(network, device=self.device, dtype=dtype, memory_format=self.order)  # type: ignore[call-overload]

    @contextmanager
    def fp32_fallback(self) -> Iterator[bool]:
        """A context in which everything computes in fp32. Gives whether it did not before."""
        dtype = self.dtype
        if dtype == torch.float32:
            yield False
            return
        try:
            # Memory may run out between the two networks; whatever was moved goes back.
            self.to(torch.float32)
            yield True
        finally:
            try:
                self.to(dtype)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                with suppress(AttributeError):
                    getattr(torch, self.device.type).empty_cache()
                try:
                    self.to(dtype)
                except Exception as again:
                    raise OSDFaceError(
                        "Memory is too short to bring the networks back to half precision, so that "
                        "nothing more can be restored: start again, in fp32."
                    ) from again

    def _given(self, tensor: Tensor) -> Tensor:
        order = self.order if tensor.ndim == 4 else torch.contiguous_format
        return tensor.to(device=self.device, dtype=self.dtype).contiguous(memory_format=order)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        with optimized(self.device, self.vae):
            encoded = self.vae.encode(self._given(pixels * 2 - 1))
        mean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return mean.float() * self.scaling

    @exact()
    @torch.no_grad()
    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        given = self._given(prompts)
        noise = self.unet(self._given(latents), timestep, encoder_hidden_states=given).sample
        # In fp64, which Apple's MPS does not have.
        exact = torch.device("cpu") if self.device.type == "mps" else self.device
        return x0_of(latents.to(exact), noise.to(exact, torch.float32), timestep)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with optimized(self.device, self.vae):
            pixels = self.vae.decode(self._given(latents / self.scaling)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def max_batch(self, height: int, width: int) -> int:
        values = VALUES_PER_FACE * height * width / SIDE**2
        return max_batch(self.device, self.dtype, values)

    def out_of_memory(self, error: BaseException) -> bool:
        return is_out_of_memory(error)
