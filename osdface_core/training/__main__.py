"""`python -m osdface_core.training TASK`, as docs/training.md tells. TASK is stage1, stage2,
autoencoder, detector, parser, osediff, diffir or prepare.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from ..errors import OSDFaceError
from .config import read_config, written

log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m osdface_core.training",
        description="Trains OSDFace, OSEDiff, DiffIR and the built-in models; docs/training.md "
        "tells how.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, does in (
        ("stage1", "the code books of the visual embedder"),
        ("stage2", "the restoration"),
        ("autoencoder", "the built-in model's autoencoder"),
        ("detector", "the built-in face detector"),
        ("parser", "the built-in face parser"),
        ("osediff", "OSEDiff, for whole pictures or for faces"),
        ("diffir", "DiffIR, to enlarge, deblur or fill holes"),
    ):
        command = commands.add_parser(name, help=f"train {does}")
        command.add_argument(
            "--config",
            type=Path,
            required=True,
            help="YAML; examples are in osdface_core/training/configs",
        )
        command.add_argument(
            "changes",
            nargs="*",
            metavar="key=value",
            help="changes to the configuration, such as run.steps=1000",
        )
    command = commands.add_parser("prepare", help="cut aligned faces out of a folder of pictures")
    command.add_argument("pictures", type=Path, help="folder, searched through")
    command.add_argument("faces", type=Path, help="folder to write to")
    command.add_argument(
        "--detector",
        type=Path,
        required=True,
        help="weights of a RetinaFace, as `python install.py` fetches them",
    )
    command.add_argument("--size", type=int, default=512, help="pixels a side of a face")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        if given.command == "prepare":
            from .prepare import prepare

            prepare(given.pictures, given.faces, given.detector, given.size)
        else:
            _train(given.command, given.config, given.changes)
    except OSDFaceError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _train(name: str, path: Path, changes: list[str]) -> None:
    try:
        from .autoencoder import AutoencoderConfig, AutoencoderTask
        from .detector import DetectorConfig, DetectorTask
        from .diffir import DiffIRConfig, DiffIRTask
        from .face_parser import ParserConfig, ParserTask
        from .loop import accelerator_for, train
        from .osediff import OSEDiffConfig, OSEDiffTask
        from .stage1 import Stage1Config, Stage1Task
        from .stage2 import Stage2Config, Stage2Task
    except ImportError as error:
        raise OSDFaceError(
            f"Training needs {error.name}: run `pip install -r requirements-dev.txt`."
        ) from error
    tasks: dict[str, tuple[Any, Any]] = {
        "stage1": (Stage1Config, Stage1Task),
        "stage2": (Stage2Config, Stage2Task),
        "autoencoder": (AutoencoderConfig, AutoencoderTask),
        "detector": (DetectorConfig, DetectorTask),
        "parser": (ParserConfig, ParserTask),
        "osediff": (OSEDiffConfig, OSEDiffTask),
        "diffir": (DiffIRConfig, DiffIRTask),
    }
    kind, make = tasks[name]
    config = read_config(kind, path, changes)
    accelerator = accelerator_for(config.run)
    if not accelerator.is_main_process:
        logging.getLogger().setLevel(logging.WARNING)
    train(make(config, accelerator), config.run, written(config))


if __name__ == "__main__":
    sys.exit(main())
