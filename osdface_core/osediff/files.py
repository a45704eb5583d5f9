"""OSEDiff's weight files."""

from __future__ import annotations

from pathlib import Path

from ..weights.catalogue import RELEASES, WeightFile

# Folder inside the host's models folder.
FOLDER = "osediff"
SEARCHED: dict[str, tuple[str, ...]] = {FOLDER: (FOLDER,)}

# The parts of the files: adapters of the UNet and of the VAE's encoder. The released pickle has a
# prefix before these names.
UNET, VAE = "unet", "vae"
RELEASED_PREFIX = "state_dict_"

_PLACE = "cswry/OSEDiff/"
_LICENCE = "Apache-2.0 (cswry/OSEDiff)"
_BY_HAND = "https://github.com/cswry/OSEDiff/tree/main/preset/models"
_ABOUT = 34_000_000


def _convert(source: Path, target: Path) -> Path:
    from .convert import convert

    return convert(source, target)


def _released(name: str, purpose: str) -> WeightFile:
    return WeightFile(
        name=name,
        purpose=purpose,
        folder=FOLDER,
        licence=_LICENCE,
        by_hand=_BY_HAND,
        about=_ABOUT,
        addresses=(f"{RELEASES}{_PLACE}raw/main/preset/models/{name}",),
        signature={
            "state_dict_unet.conv_in.base_layer.weight": (320, 4, 3, 3),
            "state_dict_unet.conv_in.base_layer.bias": (320,),
        },
        needed=False,
    )


def _converted(source: WeightFile, purpose: str) -> WeightFile:
    return WeightFile(
        name=Path(source.name).with_suffix(".safetensors").name,
        purpose=purpose,
        folder=FOLDER,
        licence=_LICENCE,
        by_hand=_BY_HAND,
        about=_ABOUT,
        made_from=(source.name,),
        convert=_convert,
        signature={
            "unet.conv_in.base_layer.weight": (320, 4, 3, 3),
            "vae.quant_conv.alpha": (),
        },
        needed=False,
    )


PICTURES_PICKLE = _released("osediff.pkl", "OSEDiff's weights as released")
FACES_PICKLE = _released("osediff_face.pkl", "OSEDiff's weights for faces as released")
PICTURES = _converted(PICTURES_PICKLE, "OSEDiff's weights, converted")
FACES = _converted(FACES_PICKLE, "OSEDiff's weights for faces, converted")
FILES = (PICTURES, FACES, PICTURES_PICKLE, FACES_PICKLE)
