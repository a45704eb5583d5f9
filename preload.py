"""A WebUI's door for command-line options: it runs this file before anything is loaded."""

from __future__ import annotations

import argparse


def preload(parser: argparse.ArgumentParser) -> None:
    """Adds our option to the WebUI's."""
    parser.add_argument(
        "--osdface-models-path",
        type=str,
        default=None,
        metavar="DIR",
        help="folder of OSDFace's weights, searched before models/osdface",
    )
