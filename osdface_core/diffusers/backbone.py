"""diffusers behind the core: a UNet and an autoencoder from a folder or a checkpoint, the LoRA
through peft, as a Backbone.

diffusers and peft are imported where they are used: the core works without them.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..cpu import computes_in_bf16, faster
from ..errors import OSDFaceError
from ..layers import filled
from ..osdface.vre.embedder import SIDE, WIDTH
from ..sd21.adapters import LoraModule, _some, parse_lora
from ..sd21.backbone import LATENT_CHANNELS, STRIDE, TIMESTEPS, alphas_cumprod
from ..weights.reading import read_tensors

# A UNet2DConditionModel; an AutoencoderKL or AutoencoderTiny. Not imported, even for types:
# diffusers' are hidden behind its laziness.
UNet: TypeAlias = Any
Autoencoder: TypeAlias = Any

log = logging.getLogger(__name__)

SCALING = 0.18215
ADAPTER = "osdface"
REMEDY = (
    "give the folder of stable-diffusion-2-1-base in diffusers' layout, or "
    "v2-1_512-ema-pruned.safetensors."
)

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
# Stable Diffusion 2.1-base's, for checkpoints, which carry no configuration.
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": LATENT_CHANNELS,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": SIDE,
    "scaling_factor": SCALING,
}
# SD 2.1's 768-v checkpoint has the same names and shapes. ComfyUI tells it by the spread of this
# bias, which is far larger there.
V_WITNESS, V_SPREAD = UNET_PREFIX + "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09

# Peak of the activations for a 512 px crop, in values, in the decoder's last level.
VALUES_A_FACE = 600 * 1024**2
MOST_FACES_AT_ONCE = 16


# The machine


def best_device() -> torch.device:
    """The accelerator that this torch finds (CUDA or ROCm, XPU, MPS ...), else the CPU."""
    # torch 2.6 cannot be asked for both at once.
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return accelerator or torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """Half precision where the device computes in it: fp16 on an accelerator, bf16 on a CPU that
    has instructions for it.
    """
    if device.type != "cpu":
        return torch.float16
    return torch.bfloat16 if computes_in_bf16() else torch.float32


# The networks


def load(path: Path) -> tuple[UNet, Autoencoder]:
    """The UNet and the autoencoder of a folder in diffusers' layout or of a single-file checkpoint,
    fp32, on the CPU.

    Nothing is fetched. Raises OSDFaceError, in one sentence, for anything but Stable Diffusion
    2.1-base or a fine-tune of it.
    """
    if path.is_dir():
        return _load_folder(path)
    return _load_file(path)


def _load_folder(path: Path) -> tuple[UNet, Autoencoder]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    configs = {}
    for part, name in (
        ("unet", "config.json"),
        ("vae", "config.json"),
        ("scheduler", "scheduler_config.json"),
    ):
        try:
            configs[part] = json.loads((path / part / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OSDFaceError(
                f"{path} is not a model in diffusers' layout ({part}/{name} cannot be read: "
                f"{error}); {REMEDY}"
            ) from error
    check_unet(configs["unet"], path.name)
    check_vae(configs["vae"], path.name)
    check_schedule(configs["scheduler"], path.name)
    networks: list[Any] = []
    for network, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        half = not any((path / part).glob("diffusion_pytorch_model.[bs]*")) and any(
            (path / part).glob("*.fp16.*")
        )
        try:
            made, info = network.from_pretrained(
                path / part,
                variant="fp16" if half else None,
                torch_dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise OSDFaceError(
                f"{path / part} cannot be loaded ({' '.join(str(error).split())[:200]}); {REMEDY}"
            ) from error
        if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
            raise OSDFaceError(
                f"{path / part} does not fit its configuration ({_some(list(map(str, wrong)))}); "
                f"{REMEDY}"
            )
        networks.append(made.eval().requires_grad_(False))
    return networks[0], networks[1]


def _load_file(path: Path) -> tuple[UNet, Autoencoder]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    tensors = read_tensors(path, (UNET_PREFIX, VAE_PREFIX))
    check_checkpoint({name: tuple(t.shape) for name, t in tensors.items()}, path.name)
    witness = tensors.get(V_WITNESS)
    if witness is not None and float(witness.float().std(correction=0)) > V_SPREAD:
        raise _refuse(path.name, "a model that predicts v, as Stable Diffusion 2.1 768-v does")
    misfit = f"{path.name} does not fit Stable Diffusion 2.1-base"
    unet = convert_ldm_unet_checkpoint(
        {k: t for k, t in tensors.items() if k.startswith(UNET_PREFIX)}, UNET_CONFIG
    )
    vae = convert_ldm_vae_checkpoint(
        {k: t for k, t in tensors.items() if k.startswith(VAE_PREFIX)}, VAE_CONFIG
    )

    def make(network: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
        return filled(lambda: network(**config), state, misfit, REMEDY, spare=True)

    return make(UNet2DConditionModel, UNET_CONFIG, unet), make(AutoencoderKL, VAE_CONFIG, vae)


def _refuse(source: str, what: str) -> OSDFaceError:
    return OSDFaceError(
        f"{source} is {what}; OSDFace needs Stable Diffusion 2.1-base (512 px, epsilon): {REMEDY}"
    )


def check_checkpoint(shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raises OSDFaceError unless names and shapes are those of Stable Diffusion 2 with 4 input
    channels.
    """
    first = shapes.get(UNET_PREFIX + "input_blocks.0.0.weight")
    text = shapes.get(UNET_PREFIX + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None:
        raise _refuse(source, "not a checkpoint of Stable Diffusion with its UNet")
    if any(name.startswith(UNET_PREFIX + "label_emb") for name in shapes) or text is None:
        raise _refuse(source, "another kind of model (SDXL, unCLIP or the like)")
    if text[1] != WIDTH:
        raise _refuse(
            source,
            f"a model with a text width of {text[1]} instead of {WIDTH}, such as Stable Diffusion "
            f"1.5",
        )
    if first[1] != LATENT_CHANNELS:
        raise _refuse(
            source, f"a model with {first[1]} input channels, such as an inpainting or depth model"
        )
    if not any(name.startswith(VAE_PREFIX) for name in shapes):
        raise _refuse(source, "a UNet without its autoencoder")


def check_unet(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless the UNet takes 4 latent channels and prompts 1024 wide, and
    nothing else.
    """
    channels, width = config.get("in_channels"), config.get("cross_attention_dim")
    if width != WIDTH:
        raise _refuse(source, f"a model with a text width of {width} instead of {WIDTH}")
    if (
        channels != LATENT_CHANNELS
        or config.get("out_channels", LATENT_CHANNELS) != LATENT_CHANNELS
    ):
        raise _refuse(
            source, f"a model with {channels} input channels, such as an inpainting or depth model"
        )
    if (
        config.get("class_embed_type")
        or config.get("num_class_embeds")
        or config.get("addition_embed_type")
    ):
        raise _refuse(source, "a variant with another UNet (unCLIP, upscaler, SDXL or the like)")


def check_vae(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless the autoencoder makes 4 channels at an eighth of the size."""
    channels, stride = (
        config.get("latent_channels"),
        2 ** (len(config.get("block_out_channels", ())) - 1),
    )
    if channels != LATENT_CHANNELS or stride != STRIDE or config.get("shift_factor"):
        raise _refuse(
            source, f"a model whose autoencoder makes {channels} channels at 1/{stride} of the size"
        )


def check_schedule(config: dict[str, Any], source: str) -> None:
    """Raises OSDFaceError unless a scheduler's configuration is Stable Diffusion's, predicting
    epsilon.
    """
    kind = config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise _refuse(source, f"a model that predicts {kind}, as Stable Diffusion 2.1 768-v does")
    given = (
        config.get("num_train_timesteps"),
        config.get("beta_schedule"),
        config.get("beta_start"),
        config.get("beta_end"),
    )
    if given != (TIMESTEPS, "scaled_linear", 0.00085, 0.012):
        raise _refuse(source, f"a model with another noise schedule {given}")


# The LoRA


def add_lora(unet: UNet, lora: dict[str, LoraModule], strength: float, source: str) -> None:
    """Merges the LoRA into the UNet's weights, through peft. Raises OSDFaceError that names the
    modules that have no place in it.
    """
    from peft import LoraConfig, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    places = dict(unet.named_modules())
    tensors, left_over = {}, []
    for name, module in lora.items():
        weight = getattr(places.get(name), "weight", None)
        rank = module.down.shape[0]
        if weight is None or (weight.shape[0], weight[0].numel()) != (
            module.up.shape[0],
            module.down[0].numel(),
        ):
            left_over.append(name)
            continue
        tensors[f"{name}.lora_A.weight"] = module.down.reshape(rank, *weight.shape[1:])
        tensors[f"{name}.lora_B.weight"] = module.up.reshape(-1, rank, *(1,) * (weight.ndim - 2))
    if left_over:
        missing = f"{len(left_over)} of the {len(lora)} modules of {source} ({_some(left_over)})"
        raise OSDFaceError(f"The UNet has no weight for {missing}; {REMEDY}")
    ranks = {name: module.down.shape[0] for name, module in lora.items()}
    alphas = {name: module.scale * ranks[name] for name, module in lora.items()}
    rank, alpha = (
        Counter(ranks.values()).most_common(1)[0][0],
        Counter(alphas.values()).most_common(1)[0][0],
    )
    unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # peft says int and divides by the rank
            rank_pattern={name: value for name, value in ranks.items() if value != rank},
            alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
            target_modules=list(lora),
        ),
        ADAPTER,
    )
    loaded: Any = set_peft_model_state_dict(unet, tensors, ADAPTER)
    landed = [name for name, place in unet.named_modules() if isinstance(place, LoraLayer)]
    wrong = [
        *loaded.unexpected_keys,
        *(key for key in loaded.missing_keys if ".lora_" in key),
        *(set(lora) ^ set(landed)),
    ]
    if wrong:
        raise OSDFaceError(
            f"peft did not put every module of {source} into the UNet ({_some(sorted(wrong))}): "
            f"update peft and diffusers."
        )
    unet.fuse_lora(lora_scale=strength)
    unet.unload_lora()
    unet.requires_grad_(False)


# The step


class DiffusersBackbone:
    """A UNet2DConditionModel and an autoencoder of diffusers as the core's Backbone.

    unet: predicts epsilon on Stable Diffusion's schedule. vae: AutoencoderKL, or AutoencoderTiny.
    Both are moved to the device and type, and stay there. Tensors that come back are fp32, on the
    CPU. Raises OSDFaceError for networks of another kind.
    """

    def __init__(
        self,
        unet: UNet,
        vae: Autoencoder,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.unet = unet.eval()
        self.vae = vae.eval()
        check_unet(self.unet.config, "The UNet")
        self.scaling = float(self.vae.config.scaling_factor)
        self.device = device or best_device()
        self.to(dtype or best_dtype(self.device))

    @classmethod
    def from_files(
        cls,
        model: Path,
        lora: Path | None = None,
        strength: float = 1.0,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> DiffusersBackbone:
        """model: see `load`. lora: OSDFace's, in any spelling. Raises OSDFaceError."""
        unet, vae = load(model)
        if lora is not None and strength:
            add_lora(unet, parse_lora(read_tensors(lora), lora.name), strength, lora.name)
        return cls(unet, vae, device=device, dtype=dtype)

    def to(self, dtype: torch.dtype) -> None:
        """Computes in another type from here on."""
        self.dtype = dtype
        # torch's group norm on the CPU loses four digits in channels-last order, which is nothing
        # beside bf16's three.
        self.order = (
            torch.contiguous_format
            if self.device.type == "cpu" and dtype == torch.float32
            else torch.channels_last
        )
        for network in (self.unet, self.vae):
            # Not by the network's own `to`: diffusers' warns of fp16 where there is nothing to be
            # warned of.
            nn.Module.to(network, device=self.device, dtype=dtype, memory_format=self.order)  # type: ignore[call-overload]

    @contextmanager
    def precisely(self) -> Iterator[bool]:
        """Computes in fp32 within, for what half precision has no numbers for. Gives whether it did
        not before.
        """
        dtype = self.dtype
        if dtype == torch.float32:
            yield False
            return
        self.to(torch.float32)
        try:
            yield True
        finally:
            self.to(dtype)

    def _given(self, tensor: Tensor) -> Tensor:
        order = self.order if tensor.ndim == 4 else torch.contiguous_format
        return tensor.to(device=self.device, dtype=self.dtype).contiguous(memory_format=order)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        with faster(self.device, self.vae):
            encoded = self.vae.encode(self._given(pixels * 2 - 1))
        mean = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return mean.float().cpu() * self.scaling

    @torch.no_grad()
    def denoise(self, latents: Tensor, prompts: Tensor, timestep: int) -> Tensor:
        noise = (
            self.unet(self._given(latents), timestep, encoder_hidden_states=self._given(prompts))
            .sample.float()
            .cpu()
        )
        abar = alphas_cumprod()[timestep]
        return ((latents.cpu().double() - (1 - abar).sqrt() * noise) / abar.sqrt()).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        with faster(self.device, self.vae):
            pixels = self.vae.decode(self._given(latents / self.scaling)).sample
        return (pixels.float().cpu() / 2 + 0.5).clamp(0, 1)

    def faces_that_fit(self, height: int, width: int) -> int:
        # On a CPU two at once take more memory and no less time.
        if self.device.type == "cpu":
            return 1
        a_face = VALUES_A_FACE * self.dtype.itemsize * height * width / SIDE**2
        return max(1, min(MOST_FACES_AT_ONCE, int(_free_memory(self.device) / a_face)))

    def out_of_memory(self, error: BaseException) -> bool:
        return out_of_memory(error)


def _free_memory(device: torch.device) -> float:
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    try:
        return torch.get_device_module(device).mem_get_info(device)[0]
    except (AttributeError, RuntimeError):
        return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory ran out: on an accelerator, on MPS (which has no error of its
    own), or on the CPU.
    """
    says = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and (
            "out of memory" in says
            or "can't allocate memory" in says
            or "not enough memory" in says
        )
    )
