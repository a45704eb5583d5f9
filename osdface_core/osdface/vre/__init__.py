"""The Visual Representation Embedder: encoder, code selection, projector, reading of weights."""

from .embedder import VisualEmbedder, choose_codes, embed
from .encoder import Shape
from .loading import build_embedder, embedder_files, read_embedder, shape_of

__all__ = [
    "Shape",
    "VisualEmbedder",
    "build_embedder",
    "choose_codes",
    "embed",
    "embedder_files",
    "read_embedder",
    "shape_of",
]
