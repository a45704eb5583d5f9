"""Puts tensors into the networks: of a file, or those that another program holds, uncopied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..layers import shapes_only
from ..sd21.adapters import Lora, some
from ..sd21.base_model import (
    REMEDY,
    UNET_PREFIX,
    VAE_PREFIX,
    check_checkpoint,
    check_folder,
)
from ..sd21.modules import (
    SD21_UNET,
    VAE_WIDTHS,
    UNetShape,
    ldm_names,
    unet_layers,
    vae_decoder_layers,
    vae_encoder_layers,
)
from ..weights.reading import read_tensors
from .layers import Layer, merged
from .networks import Autoencoder, UNet

Network = TypeVar("Network", bound=nn.Module)
Tensors = Mapping[str, Tensor]

# The weights of a part in diffusers' layout, the best first.
FOLDER_FILES = tuple(
    f"diffusion_pytorch_model{kind}.{end}"
    for kind in ("", ".fp16")
    for end in ("safetensors", "bin")
)


@dataclass(frozen=True)
class Shapes:
    """How large the networks are."""

    unet: UNetShape = SD21_UNET
    vae: tuple[int, ...] = VAE_WIDTHS
    vae_groups: int = 32


SD21 = Shapes()


def read(path: Path, shapes: Shapes = SD21) -> tuple[Tensors, Tensors]:
    """The tensors of the UNet and of the autoencoder by their LDM names, on the CPU.

    Raises OSDFaceError for anything but Stable Diffusion 2.1-base or a fine-tune of it.

    path: a checkpoint, or a folder in diffusers' layout.
    shapes: of the networks.
    """
    if path.is_dir():
        return _read_folder(path, shapes)
    tensors = read_tensors(path, (UNET_PREFIX, VAE_PREFIX))
    check_checkpoint(tensors, path.name)
    unet, vae = (
        {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        for prefix in (UNET_PREFIX, VAE_PREFIX)
    )
    return unet, vae


def check_tensors(unet: Tensors, autoencoder: Tensors, source: str, remedy: str = REMEDY) -> None:
    """Raises OSDFaceError unless tensors by LDM names are those of Stable Diffusion 2.1-base.

    source: where they are from.
    remedy: the end of the sentence.
    """
    whole = {UNET_PREFIX + name: tensor for name, tensor in unet.items()}
    whole |= {VAE_PREFIX + name: tensor for name, tensor in autoencoder.items()}
    check_checkpoint(whole, source, remedy)


def _read_folder(path: Path, shapes: Shapes) -> tuple[Tensors, Tensors]:
    check_folder(path)
    vae_layers = vae_encoder_layers(shapes.vae) | vae_decoder_layers(shapes.vae)
    found = []
    for part, layers in (("unet", unet_layers(shapes.unet)), ("vae", vae_layers)):
        files = [path / part / name for name in FOLDER_FILES if (path / part / name).is_file()]
        if not files:
            raise OSDFaceError(
                f"{path / part} holds no {FOLDER_FILES[0]}; a file in one piece is wanted: {REMEDY}"
            )
        found.append(renamed(read_tensors(files[0]), ldm_names(layers)))
    return found[0], found[1]


def renamed(tensors: Tensors, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors by LDM names. names: of the layers, by those that the tensors have."""
    found = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        found[f"{names.get(layer, layer)}.{kind}"] = tensor
    return found


def build(
    make: Callable[[], Network], tensors: Tensors, source: str, remedy: str = REMEDY
) -> Network:
    """A network whose parameters are the very tensors given; those without a place are ignored.

    Nothing is copied. A Parameter stays the one it is, so that whoever moves it moves it here too.
    Raises OSDFaceError that names what is missing or misshapen.

    make: creates the network.
    tensors: by the network's own names.
    source: where they are from, for errors.
    remedy: the end of the sentence.
    """
    with shapes_only():
        network = make()
    faults = []
    for name, place in list(network.named_parameters()):
        tensor = tensors.get(name)
        if tensor is None:
            faults.append(f"{name} is missing")
        elif _size(tensor.shape) != _size(place.shape):
            faults.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(place.shape)}")
        else:
            layer, _, kind = name.rpartition(".")
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(network.get_submodule(layer), kind, tensor)
    if faults:
        raise OSDFaceError(
            f"{source} does not fit Stable Diffusion 2.1-base ({some(faults)}): {remedy}"
        )
    return network.eval()


def _size(shape: torch.Size) -> tuple[int, ...]:
    """A shape without trailing ones: 1 x 1 convolutions are linear layers."""
    sides = list(shape)
    while sides and sides[-1] == 1:
        sides.pop()
    return tuple(sides)


def add_lora(network: nn.Module, lora: Lora, strength: float, source: str, *, merge: bool) -> None:
    """Adds a LoRA to a network. Further calls add further LoRAs.

    Raises OSDFaceError that names the layers that have no place in the network.

    network: whose layers the adapters' LDM names are.
    lora: the adapters.
    strength: factor of all of them.
    source: the LoRA's name, for errors.
    merge: whether the weights are changed; else they stay, and each is merged whenever its layer is
        called.
    """
    layers = dict(network.named_modules())
    found, left_over = [], []
    for name, adapter in lora.items():
        layer = layers.get(adapter.ldm)
        size = adapter.up.shape[0], adapter.down[0].numel()
        if isinstance(layer, Layer) and (layer.weight.shape[0], layer.weight[0].numel()) == size:
            found.append((layer, adapter))
        else:
            left_over.append(name)
    if left_over:
        missing = f"{len(left_over)} of the {len(lora)} layers of {source} ({some(left_over)})"
        raise OSDFaceError(f"The network has no weight for {missing}; {REMEDY}")
    for layer, adapter in found:
        if merge:
            before = layer.weight.detach()
            weight = merged(before, adapter, strength)
            if before.dtype == weight.dtype:
                # In place: tensors of a file share its memory, which stays while one of them does.
                before.copy_(weight)
            else:
                layer.weight = nn.Parameter(weight, requires_grad=False)
        else:
            layer.adapters.append((adapter, strength))


def load(
    unet: Tensors, autoencoder: Tensors, source: str, shapes: Shapes = SD21, remedy: str = REMEDY
) -> tuple[UNet, Autoencoder]:
    """Both networks on the very tensors given, as `build` makes them.

    unet: by LDM names.
    autoencoder: by LDM names.
    source: where they are from, for errors.
    shapes: of the networks.
    remedy: the end of an error's sentence.
    """
    return (
        build(lambda: UNet(shapes.unet), unet, source, remedy),
        build(lambda: Autoencoder(shapes.vae, shapes.vae_groups), autoencoder, source, remedy),
    )
