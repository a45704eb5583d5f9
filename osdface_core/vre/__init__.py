"""Visual Representation Embedder: encoder, code selection, projector, and the reading of their weights."""

from .embedder import TOKENS, WIDTH, VisualEmbedder, choose_codes
from .loading import build_embedder, read_embedder

__all__ = ["TOKENS", "WIDTH", "VisualEmbedder", "build_embedder", "choose_codes", "read_embedder"]
