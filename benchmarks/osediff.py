"""OSEDiff for benchmarks/speed.py: the paper's released code and ours, from picture to picture.

Both get the same prompt of random numbers: neither text encoder nor tagger is measured. The
released code's copies of diffusers 0.25's UNet and autoencoder are replaced by those of the
diffusers that is installed, which are the same networks; its draw from the posterior, by the mean.
"""

from __future__ import annotations

import argparse
import os
import sys
import types
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import speed

NAME = "osediff.safetensors"
SCALE = 4
STAGES = ("encode", "step", "decode")


def inputs(given: argparse.Namespace, side: int) -> Tensor:
    """A picture (1,s,s,3) in [0,1] whose result has this side in pixels."""
    return speed.squares(given.data / "images" / "portraits", 1, side // SCALE)


def text() -> Tensor:
    """What stands for the hidden state (1,77,1024) of a text."""
    return torch.randn(1, 77, 1024, generator=torch.Generator().manual_seed(0))


class OnCpu(TorchFunctionMode):
    """Takes a device named cuda for the processor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]

        def here(x: Any) -> Any:
            named = isinstance(x, str | torch.device) and torch.device(x).type == "cuda"
            return torch.device("cpu") if named else x

        if func is torch.Tensor.to:
            args = (args[0], *map(here, args[1:]))
        kwargs = {key: here(x) if key == "device" else x for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Paper:
    """The released class OSEDiff_test and its script's work around it, as they are."""

    def __init__(self, given: argparse.Namespace) -> None:
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        sys.path[:0] = [str(given.paper)]
        os.chdir(given.paper)
        for name, network in (
            ("autoencoder_kl", AutoencoderKL),
            ("unet_2d_condition", UNet2DConditionModel),
        ):
            module: Any = types.ModuleType(f"models.{name}")
            setattr(module, network.__name__, network)
            sys.modules[module.__name__] = module
        import osediff
        from my_utils.wavelet_color_fix import adain_color_fix

        DiagonalGaussianDistribution.sample = lambda self, generator=None: self.mode()
        absent = types.SimpleNamespace(from_pretrained=lambda *_, **__: torch.nn.Identity())
        osediff.AutoTokenizer = osediff.CLIPTextModel = absent
        self.kind = {"fp32": torch.float32, "fp16": torch.float16}[given.kind]
        self.device = torch.device("cuda" if speed.CUDA else "cpu")
        prompt = text().to(self.device, self.kind)
        osediff.OSEDiff_test.encode_prompt = lambda self, texts: prompt
        options = argparse.Namespace(
            pretrained_model_name_or_path=str(given.weights / "sd21-diffusers"),
            osediff_path=str(given.osediff),
            mixed_precision=given.kind,
            merge_and_unload_lora=False,
            vae_decoder_tiled_size=224,
            vae_encoder_tiled_size=1024,
            latent_tiled_size=96,
            latent_tiled_overlap=32,
        )
        self.here = speed.contextlib.nullcontext() if speed.CUDA else OnCpu()
        with self.here:
            self.program = osediff.OSEDiff_test(options)
        # As in diffusers 0.25, which does not look the timestep up.
        self.program.noise_scheduler.previous_timestep = lambda step: step - 1000
        self.match = adain_color_fix

    def faces(self, pictures: Tensor) -> tuple[Tensor, dict[str, float]]:
        from torchvision.transforms import functional

        image = functional.to_pil_image(pictures[0].movedim(-1, 0))
        image = image.resize((image.width * SCALE, image.height * SCALE))
        given = functional.to_tensor(image)[None] * 2 - 1
        with self.here:
            made = self.program(given.to(self.device), prompt="")
        done = functional.to_pil_image(made[0].float().cpu() * 0.5 + 0.5)
        result = functional.to_tensor(self.match(target=done, source=image))
        return result.movedim(0, -1)[None], {}


class Ours(speed.Ours):
    """The node, called as ComfyUI calls it."""

    def __init__(self, given: argparse.Namespace) -> None:
        from osdface_core.osediff.convert import convert

        super().__init__(given)
        folder = self.base / "models" / "osediff"
        folder.mkdir(exist_ok=True)
        convert(given.osediff, folder / NAME)
        # Its backbone's stages are timed where they call their base class's.
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def faces(self, pictures: Tensor, **changed: Any) -> tuple[Tensor, dict[str, float]]:
        self.seconds.update(dict.fromkeys(STAGES, 0.0))
        self.vae.__dict__.pop("osdface_latents", None)
        for clone in (self.vae, *self.vae.__dict__.values()):
            getattr(clone, "__dict__", {}).pop("osdface_latents", None)
        (done,) = self.call(
            "OSEDiffUpscale",
            image=pictures,
            model=self.model,
            vae=self.vae,
            conditioning=[[text(), {}]],
            osediff_name=NAME,
            upscale=float(SCALE),
            tile=768,
            overlap=256,
            color_match="adain",
        )
        return done, dict(self.seconds)
