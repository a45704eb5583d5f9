"""The command line on a device that the machine does not have (tests/fake_device.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("diffusers", reason="no diffusers: pip install -r requirements-dev.txt")
pytest.importorskip("av", reason="no PyAV: pip install -r requirements-dev.txt")
pytest.importorskip("imagecodecs", reason="no imagecodecs: pip install -r requirements-dev.txt")
pytest.importorskip("tifffile", reason="no tifffile: pip install -r requirements-dev.txt")

from osdface_core import cli
from tests.conftest import DEVICE as REAL
from tests.fake_device import DEVICE, elsewhere
from tests.test_diffir import small

pytestmark = pytest.mark.processor
# Of 255: the mean, since a seed's worth of rounding may move a few pixels of a random network far.
CLOSE = {"fp32": 0.01, "bf16": 3, "fp16": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with small networks of DiffIR."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "diffir").mkdir()
    for name, kind in (("deblur", "deblur"), ("celeba", "inpaint"), ("GANx2-V2", "x2")):
        file = folder / "diffir" / f"DiffIRS2-{name}.safetensors"
        save_file(small(kind).state_dict(), file)
    return folder


@pytest.fixture(scope="module")
def given(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of a face, with alpha, and a mask."""
    folder = tmp_path_factory.mktemp("given")
    picture = Image.open(photographs / "astronaut.png").convert("RGBA").crop((140, 20, 330, 210))
    picture.save(folder / "face.png")
    mask = np.zeros((190, 190), np.uint8)
    mask[60:66, 20:160] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path)).astype(float)


COMMANDS: dict[str, list[str]] = {
    "restore": ["restore", "--model", "builtin", "--detector", "builtin", "--confidence", "0.5"],
    "deblur": ["deblur"],
    "upscale": ["upscale", "--method", "diffir", "--scale", "2"],
    "inpaint": ["inpaint", "--mask", "mask.png"],
}


@pytest.mark.skipif(bool(REAL), reason="a real device is tested elsewhere")
@pytest.mark.parametrize(
    ("command", "dtype"),
    [(name, "fp32") for name in COMMANDS] + [("restore", "fp16"), ("restore", "bf16")],
)
def test_a_command_gives_what_it_gives_on_the_cpu(
    command: str, dtype: str, models: Path, given: Path, tmp_path: Path
) -> None:
    def run(device: Any, out: str, *more: str) -> Any:
        source, target = str(given / "face.png"), str(tmp_path / out)
        arguments = [str(given / x) if x == "mask.png" else x for x in COMMANDS[command]]
        fixed = ["--models-dir", str(models), "--device", str(device)]
        command_line = [arguments[0], source, target, *arguments[1:], *fixed, *more]
        assert cli.main(command_line) == cli.OK
        return pixels(tmp_path / out)

    wanted = run("cpu", "here.png", *(["--dtype", "fp32"] if command == "restore" else []))
    assert not np.array_equal(wanted, pixels(given / "face.png"))
    with elsewhere() as counts:
        made = run(DEVICE, "there.png", *(["--dtype", dtype] if command == "restore" else []))
    assert counts["up"]
    assert counts["down"]
    assert made.shape == wanted.shape
    assert np.abs(made - wanted).mean() < CLOSE[dtype]
