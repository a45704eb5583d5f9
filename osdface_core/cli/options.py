"""The command line's options.

Those of the nodes have the nodes' names and defaults; a terminal adds some.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ..diffir.enhance import DEFAULT as ENHANCE
from ..diffir.inpaint import SIDES
from ..faces.choose import ORDER, SELECT
from ..faces.files import DETECTORS
from ..faces.paste import MASK_TYPES
from ..osdface.restore import TIMESTEP
from ..osediff.upscale import COLOR_MATCHES as UPSCALE_COLORS
from ..osediff.upscale import DEFAULT as UPSCALE
from ..osediff.upscale import MAX_SCALE
from ..pictures.color import COLOR_MATCHES
from ..sd21.schedule import TIMESTEPS

EPILOG = """\
Exit codes: 0 everything is done, 1 some files failed and are named, 2 wrong usage or weights and
nothing was done, 130 stopped. A run that was broken off goes on where it stopped when it is started
again: finished files are not done twice.
"""


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type for numbers from `low` to `high`."""

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is given; {low:g} to {high:g} is wanted")
        return value

    read.__name__ = "whole number" if kind is int else "number"
    return read


def words(text: str) -> str:
    """An argparse type for choices without quotes: `most-central` for `most central`."""
    return text if text in ("mean-std",) else text.replace("-", " ")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    top = argparse.ArgumentParser(
        prog="python -m osdface_core", description="OSDFace from the command line."
    )
    commands = top.add_subparsers(
        dest="command", required=True, metavar="restore | upscale | deblur | inpaint"
    )
    restore = commands.add_parser(
        "restore",
        help="restore the faces of a picture, a folder or a video",
        description="Restores the faces of a picture, of a folder of pictures and videos (with "
        "all below it), or of a video.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(restore)
    _add_weights(restore)
    _add_machine(restore)
    _add_faces(restore)
    _add_aligned(restore)
    _add_restoration(restore)
    upscale = commands.add_parser(
        "upscale",
        help="enlarge and restore whole pictures and videos by OSEDiff",
        description="Enlarges and restores a picture, a folder of pictures and videos (with all "
        "below it), or a video, by OSEDiff; with --faces its faces by OSDFace too.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_files(upscale)
    _add_weights(upscale)
    _add_upscaling(upscale)
    _add_diffir(upscale)
    _add_machine(upscale)
    _add_faces(upscale)
    # What else is set of faces has the defaults of `restore`.
    given = vars(upscale.parse_args(["in", "out"]))
    defaults = vars(restore.parse_args(["in", "out"]))
    upscale.set_defaults(**{k: v for k, v in defaults.items() if k not in given})
    deblur = commands.add_parser(
        "deblur",
        help="take motion blur away from pictures and videos by DiffIR",
        description="Takes motion blur away from a picture, a folder of pictures and videos (with "
        "all below it), or a video, by DiffIR.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inpaint = commands.add_parser(
        "inpaint",
        help="fill scratches and other holes of pictures and videos by DiffIR",
        description="Fills the holes of a picture, of a folder of pictures and videos (with all "
        "below it), or of a video, by DiffIR; every other pixel of a picture stays.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for command in (deblur, inpaint):
        _add_files(command)
        _add_diffir(command)
        _add_models_dir(command.add_argument_group("folders").add_argument)
        _add_machine(command, precision=False)
    _add_tiles(deblur.add_argument_group("tiles").add_argument)
    _add_holes(inpaint)
    for command, needed in ((deblur, []), (inpaint, ["--mask", "mask"])):
        given = vars(command.parse_args(["in", "out", *needed]))
        command.set_defaults(faces=False, **{k: v for k, v in defaults.items() if k not in given})
    return top


def _add_diffir(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("DiffIR").add_argument
    add(
        "--diffir",
        metavar="FILE",
        help="DiffIR's weights, as downloaded or as install.py --from made them (those of the "
        "models folder); builtin for the small network that fills holes and needs no file",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of the vector that the networks start from; changes little (%(default)s)",
    )


def _add_tiles(add: Callable[..., object]) -> None:
    add(
        "--tile",
        type=number(int, 0, 8192),
        default=ENHANCE.tile,
        metavar="PX",
        help="side of the tiles of a large result, at least 128; 0 makes it whole (%(default)s)",
    )
    add(
        "--overlap",
        type=number(int, 0, 4096),
        default=ENHANCE.overlap,
        metavar="PX",
        help="pixels that neighbouring tiles share (%(default)s)",
    )


def _add_holes(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("holes").add_argument
    add(
        "--mask",
        metavar="FILE|DIR",
        type=Path,
        required=True,
        help="a picture of the same size that is not black where pixels are to be filled, or a "
        "folder of such: of photo.jpg, photo.png or photo_mask.png",
    )
    add(
        "--working-size",
        choices=SIDES,
        default=SIDES[0],
        help="pixels of the shorter side while it is filled (%(default)s)",
    )
    add(
        "--feather",
        type=number(int, 0, 256),
        default=0,
        metavar="PX",
        help="inside of the hole's edge, over which the fill fades in (%(default)s)",
    )


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("input", metavar="IN", type=Path, help="picture, folder or video")
    # A string: a Path drops the slash at the end, which marks a folder that does not exist yet.
    command.add_argument(
        "output",
        metavar="OUT",
        help="file, or folder/: for a folder IN the same tree is made in it",
    )
    add = command.add_argument_group("files").add_argument
    add("--overwrite", action="store_true", help="do again what is already in OUT")
    add(
        "--report", metavar="FILE", type=Path, help="write what was found and done to FILE, as JSON"
    )
    add(
        "--quality",
        type=number(int, 1, 100),
        default=95,
        metavar="1..100",
        help="of JPEG pictures (%(default)s)",
    )
    add(
        "--crf",
        type=number(int, 0, 51),
        default=16,
        metavar="0..51",
        help="of videos, less is better and larger (%(default)s)",
    )


def _add_weights(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("weights").add_argument
    add(
        "--model",
        help="Stable Diffusion 2.1-base: a folder in diffusers' layout or a checkpoint; or "
        "`builtin`, the small model",
    )
    add("--lora", help="OSDFace's LoRA; `none` for a model that already holds it")
    add("--vre", metavar="FILE", help="OSDFace's visual embedder")
    _add_models_dir(add)
    add("--download", action="store_true", help="fetch weights that are missing (8 GB)")


def _add_models_dir(add: Callable[..., object]) -> None:
    add(
        "--models-dir",
        metavar="DIR",
        type=Path,
        help="where weights are looked for by name (ComfyUI's models, or ~/.cache/osdface)",
    )


def _add_machine(command: argparse.ArgumentParser, precision: bool = True) -> None:
    add = command.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1, xpu, mps, cpu ... (the fastest there is)")
    if precision:
        add(
            "--dtype",
            choices=("fp32", "fp16", "bf16"),
            help="precision (half where the device has it; fp32 for the built-in model)",
        )
    add(
        "--workers",
        type=number(int, 1, 4096),
        default=1,
        metavar="N",
        help="share the files of a folder among N processes, by Ray",
    )
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="a Ray cluster that the workers run on, such as `auto`, instead of this machine",
    )


def _add_upscaling(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("enlargement").add_argument
    add(
        "--scale",
        type=number(float, 1, MAX_SCALE),
        default=UPSCALE.scale,
        metavar=f"1..{MAX_SCALE:g}",
        help="how many times as wide and high (%(default)s)",
    )
    add(
        "--method",
        choices=("osediff", "diffir"),
        default="osediff",
        help="which networks enlarge; those of DiffIR need no --model, and --scale is 1, 2 or 4 "
        "(%(default)s)",
    )
    add(
        "--osediff",
        metavar="FILE",
        help="OSEDiff's weights (osediff.safetensors of the models folder)",
    )
    add(
        "--prompt",
        default="",
        metavar="TEXT",
        help="words for what is seen, for bolder detail (none)",
    )
    add(
        "--tokenizer",
        metavar="DIR",
        type=Path,
        help="a folder with CLIP's vocab.json and merges.txt, for a --prompt with a --model that "
        "is a single file",
    )
    add(
        "--tile",
        type=number(int, 0, 8192),
        default=UPSCALE.tile,
        metavar="PX",
        help="side of the tiles of a large result, at least 256; 0 makes it whole (%(default)s)",
    )
    add(
        "--overlap",
        type=number(int, 0, 4096),
        default=UPSCALE.overlap,
        metavar="PX",
        help="pixels that neighbouring tiles share (%(default)s)",
    )
    add(
        "--color-match",
        choices=UPSCALE_COLORS,
        default=UPSCALE.color_match,
        help="towards the picture's colours (%(default)s)",
    )
    add("--faces", action="store_true", help="then restore the faces, by OSDFace")


def _add_faces(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("faces").add_argument
    add(
        "--detector",
        choices=tuple(DETECTORS),
        help="which network finds faces (the first that is there)",
    )
    add(
        "--confidence",
        type=number(float, 0.05, 0.999),
        default=0.9,
        metavar="0..1",
        help="how sure it must be (%(default)s)",
    )
    add(
        "--select",
        type=words,
        choices=SELECT,
        default=SELECT[0],
        help="which faces are meant (%(default)s)",
    )
    add(
        "--order",
        type=words,
        choices=ORDER,
        default=ORDER[0],
        help="how faces are numbered (%(default)s)",
    )
    add(
        "--indices",
        default="0",
        metavar="0,2-4",
        help='numbers of the faces that are meant with --select "by index" (%(default)s)',
    )
    add(
        "--max-faces",
        type=number(int, 0, 1000),
        default=0,
        metavar="N",
        help="at most so many faces a picture; 0 is no limit",
    )
    add(
        "--min-size",
        type=number(int, 0, 16384),
        default=24,
        metavar="PX",
        help="leave smaller faces as they are (%(default)s)",
    )
    add(
        "--max-size",
        type=number(int, 0, 16384),
        default=0,
        metavar="PX",
        help="leave larger faces as they are; 0 is no limit",
    )
    add("--any-angle", action="store_true", help="also faces that lie or stand on their head; slow")
    add(
        "--crop-size",
        type=number(int, 512, 1024),
        default=512,
        metavar="PX",
        help="side of the crops (%(default)s)",
    )
    add(
        "--smoothing",
        type=number(float, 0, 1),
        default=0.0,
        metavar="0..1",
        help="steadies the crops of a video (%(default)s)",
    )


def _add_aligned(command: argparse.ArgumentParser) -> None:
    command.add_argument_group("faces that were cut out").add_argument(
        "--aligned",
        action="store_true",
        help="the pictures are face crops already: nobody is looked for, all of each is restored "
        "and keeps its size; of the options of faces and pasting --strength, --color-match and "
        "--keep are used",
    )


def _add_restoration(command: argparse.ArgumentParser) -> None:
    add = command.add_argument_group("restoration").add_argument
    add(
        "--lora-strength",
        type=number(float, -10, 10),
        default=1.0,
        metavar="X",
        help="(%(default)s)",
    )
    add(
        "--timestep",
        type=number(int, 0, TIMESTEPS - 1),
        default=TIMESTEP,
        metavar="T",
        help="trained at %(default)s",
    )
    add(
        "--faces-per-batch",
        type=number(int, 0, 1024),
        default=0,
        metavar="N",
        help="faces at once; 0 takes as many as fit",
    )
    add = command.add_argument_group("pasting").add_argument
    add(
        "--strength",
        type=number(float, 0, 1),
        default=1.0,
        metavar="0..1",
        help="how much of the restored face shows (%(default)s)",
    )
    add(
        "--mask-type",
        choices=MASK_TYPES,
        help="parsing, or ellipse where the parser's file is missing; a given parsing then takes "
        "the small built-in parser",
    )
    add(
        "--feather",
        type=number(float, 0, 0.5),
        default=0.1,
        metavar="0..0.5",
        help="soft edge, of the crop's side (%(default)s)",
    )
    add(
        "--color-match",
        choices=COLOR_MATCHES,
        default=COLOR_MATCHES[0],
        help="towards the picture's colours (%(default)s)",
    )
    add(
        "--keep-detail",
        type=number(float, 0, 1),
        default=0.0,
        metavar="0..1",
        help="of the picture's finer detail (%(default)s)",
    )
    add(
        "--keep",
        metavar="FILE",
        type=Path,
        help="a picture that is white where pixels must stay as they are",
    )
