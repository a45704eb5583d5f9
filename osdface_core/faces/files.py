"""Weight files of the face detectors and of the face parser."""

from __future__ import annotations

from pathlib import Path

from ..weights.catalogue import BUILTIN, RELEASES, WeightFile

# Folder inside the host's models folder, and the folders that are searched for its files.
FOLDER = "facedetection"
SEARCHED: dict[str, tuple[str, ...]] = {FOLDER: (FOLDER, "facerestore_models", "osdface")}

_FACEXLIB = "xinntao/facexlib/releases/download/"
_CODEFORMER = "sczhou/CodeFormer/releases/download/v0.1.0/"
_MIT = "MIT (xinntao/facexlib; biubug6/Pytorch_Retinaface)"


def _check_detector(path: Path) -> str:
    from ..weights.reading import read_tensors
    from .detector_check import build_detector

    build_detector(read_tensors(path))
    return "finds one face where one face is drawn"


DETECTOR = WeightFile(
    name="detection_Resnet50_Final.pth",
    purpose="face detector RetinaFace, ResNet50",
    folder=FOLDER,
    licence=_MIT,
    by_hand="https://github.com/xinntao/facexlib/releases/tag/v0.1.0",
    size=109_497_761,
    sha256="6d1de9c2944f2ccddca5f5e010ea5ae64a39845a86311af6fdf30841b0a5a16d",
    addresses=(
        RELEASES + _FACEXLIB + "v0.1.0/detection_Resnet50_Final.pth",
        RELEASES + _CODEFORMER + "detection_Resnet50_Final.pth",
        "hub:camenduru/facexlib/detection_Resnet50_Final.pth",
    ),
    check=_check_detector,
    signature={
        "body.layer1.0.conv1.weight": (64, 64, 1, 1),
        "ClassHead.0.conv1x1.weight": (4, 256, 1, 1),
    },
)
SMALL_DETECTOR = WeightFile(
    name="detection_mobilenet0.25_Final.pth",
    purpose="face detector RetinaFace, MobileNet 0.25",
    folder=FOLDER,
    licence=_MIT,
    by_hand="https://github.com/xinntao/facexlib/releases/tag/v0.1.0",
    size=1_789_735,
    sha256="2979b33ffafda5d74b6948cd7a5b9a7a62f62b949cef24e95fd15d2883a65220",
    addresses=(
        RELEASES + _FACEXLIB + "v0.1.0/detection_mobilenet0.25_Final.pth",
        RELEASES + _CODEFORMER + "detection_mobilenet0.25_Final.pth",
    ),
    check=_check_detector,
    signature={"body.stage1.0.0.weight": (8, 3, 3, 3), "ClassHead.0.conv1x1.weight": (4, 64, 1, 1)},
)
PARSER = WeightFile(
    name="parsing_parsenet.pth",
    purpose="face parser ParseNet",
    folder=FOLDER,
    licence="MIT (xinntao/facexlib)",
    by_hand="https://github.com/xinntao/facexlib/releases/tag/v0.2.2",
    size=85_331_193,
    sha256="3d558d8d0e42c20224f13cf5a29c79eba2d59913419f945545d8cf7b72920de2",
    addresses=(
        RELEASES + _FACEXLIB + "v0.2.2/parsing_parsenet.pth",
        RELEASES + _CODEFORMER + "parsing_parsenet.pth",
        "hub:camenduru/facexlib/parsing_parsenet.pth",
        "hub:gmk123/GFPGAN/parsing_parsenet.pth",
    ),
    signature={
        "encoder.0.conv2d.weight": (64, 3, 3, 3),
        "out_mask_conv.conv2d.weight": (19, 64, 3, 3),
    },
)
FILES = (DETECTOR, SMALL_DETECTOR, PARSER)

# The detector and the parser that come with this project.
BUILTIN_DETECTOR = Path(__file__).with_name("detector.safetensors")
BUILTIN_PARSER = Path(__file__).with_name("parser.safetensors")
BUILTIN_PARSER_USED = f"Faces are parsed by the small built-in parser, for {PARSER.name} is missing"
# The detectors' names in menus, best first, and the file of each.
DETECTORS = {
    "retinaface_resnet50": DETECTOR.name,
    "retinaface_mobile0.25": SMALL_DETECTOR.name,
    BUILTIN: BUILTIN,
}
