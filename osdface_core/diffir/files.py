"""DiffIR's weight files: their names, where a person finds them, and under what terms."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import OSDFaceError
from ..weights.store import command

# Folder inside the host's models folder.
FOLDER = "diffir"
SEARCHED: dict[str, tuple[str, ...]] = {FOLDER: (FOLDER,)}

_DRIVE = "https://drive.google.com/drive/folders/"
_ALL = f"{_DRIVE}10miVILiopE414GyaSZM3EFAZITeY9q0p"
_REAL = f"{_DRIVE}1G3Ep0xd-uBpIXGZFdWzH1uVCOpJaqkOF"
_REAL_V2 = f"{_DRIVE}1H4DU-9fB15fSz-OFko00HlWYbNSqmAKq"
_INPAINTING = f"{_DRIVE}1RQXRWMqVaAsyyQt8T-3KtpS68ef8dh90"

# Where each file is, by the name that it is converted to.
ENHANCERS: dict[str, str] = {
    "DiffIRS2-GANx4-V2.safetensors": _REAL_V2,
    "DiffIRS2-GANx4.safetensors": _REAL,
    "DiffIRS2-GANx2-V2.safetensors": _REAL_V2,
    "DiffIRS2-GANx2.safetensors": _REAL,
    "DiffIRS2-GANx1-V2.safetensors": f"{_DRIVE}1goG_l6S0EjK2383UVzXxwLInw-O_SLwO",
    "DiffIRS2-GANx1.safetensors": f"{_DRIVE}154TGJ7wPSQKmhZBXH4ujLFk3WG_VyClV",
    "DiffIRS2-deblur.safetensors": f"{_DRIVE}1JWYaP9VVPX_Mh2w1Vezn74hck-oWSyMh",
}
INPAINTERS: dict[str, str] = {
    "DiffIRS2-celeba.safetensors": _INPAINTING,
    "DiffIRS2-place.safetensors": _INPAINTING,
    "Big-DiffIRS2-place.safetensors": _INPAINTING,
}
# The small network that comes with this project, for holes in faces.
BUILTIN_INPAINTER = Path(__file__).with_name("builtin") / "inpaint.safetensors"
LICENCE = (
    "its authors state no licence for the weights; CelebA-HQ, which those named celeba were "
    "trained on, is for research that earns nothing"
)

_RELEASED = re.compile(r"(?:Big-)?DiffIRS2-(?:GANx[124](?:-V2)?|celeba|place)")
_BASICSR, _LIGHTNING = "net_g", ("last", "epoch", "best")


def missing(name: str) -> OSDFaceError:
    """The error for a file that is not there."""
    where = (ENHANCERS | INPAINTERS).get(name, _ALL)
    return OSDFaceError(
        f"{name} is missing: download it from {where}, keep it in any folder and run "
        f"{command('--from', 'FOLDER')} in a terminal ({LICENCE})."
    )


def released_name(path: Path, job: str) -> str:
    """The name under which a downloaded file is kept, without its ending.

    Its content does not tell V1 from V2, nor faces from places, and the file itself may be called
    last.ckpt or net_g_latest.pth: the folders that it was released in tell. job: DEBLUR, INPAINT or
    UPSCALE.
    """
    if path.stem.startswith("SISR-"):
        return path.stem
    parts = [path.stem, *(parent.name for parent in path.absolute().parents)][:4]
    found = [match[0] for part in parts if (match := _RELEASED.search(part))]
    if found:
        return max(found, key=len)
    if path.stem.startswith((_BASICSR, *_LIGHTNING)):
        return f"DiffIRS2-{job}"
    return path.stem
