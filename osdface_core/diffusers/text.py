"""The text encoder of Stable Diffusion 2.1-base, by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OSDFaceError
from ..sd21.adapters import some
from ..sd21.backbone import BEGIN, END, PAD, TEXT_HEAD_WIDTH, TEXT_WIDTH, TOKENS
from ..sd21.base_model import TEXT_PREFIX as PREFIX
from ..weights.reading import read_tensors
from .loading import REMEDY


class TextEncoder:
    """Texts to the last hidden state (1,77,1024) fp32, on the CPU, as OSEDiff takes it.

    A text that is too long is cut off, as the released code does. Nothing is downloaded. Raises
    OSDFaceError for a model without its text encoder, or without a tokenizer where one is needed.

    model: a folder in diffusers' layout with `text_encoder` and `tokenizer`, or a checkpoint.
    tokenizer: a folder with vocab.json and merges.txt, for a text that is not empty and a
        checkpoint, which holds none.
    device: to compute on; the CPU if None.
    """

    def __init__(
        self, model: Path, tokenizer: Path | None = None, device: torch.device | None = None
    ) -> None:
        self.tokenizer = tokenizer or (model / "tokenizer" if model.is_dir() else None)
        self.device = device or torch.device("cpu")
        encoder = (_from_folder if model.is_dir() else _from_checkpoint)(model)
        self.encoder = encoder.to(self.device)

    @torch.no_grad()
    def __call__(self, text: str) -> Tensor:
        ids = token_ids(text, self.tokenizer).to(self.device)
        hidden: Tensor = self.encoder(ids)[0]
        return hidden.float().cpu()


def encode_text(
    model: Path,
    text: str,
    *,
    tokenizer: Path | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """One text (1,77,1024) by a TextEncoder that is not kept.

    model: as there.
    text: may be empty.
    tokenizer: as there.
    device: as there.
    """
    folder = tokenizer or (model / "tokenizer" if model.is_dir() else None)
    token_ids(text, folder)  # raises before anything large is read
    return TextEncoder(model, tokenizer, device)(text)


def token_ids(text: str, tokenizer: Path | None) -> Tensor:
    """The tokens (1,77) of a text; an empty one needs no tokenizer."""
    ids = [BEGIN, END]
    if text.strip():
        from transformers import CLIPTokenizer

        if tokenizer is None or not (tokenizer / "vocab.json").is_file():
            raise OSDFaceError(
                f"The text {text[:60]!r} needs CLIP's tokenizer, and {tokenizer or 'a checkpoint'} "
                "has no vocab.json and merges.txt: name the folder of one, or leave the text empty."
            )
        read = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
        ids = read(text, truncation=True, max_length=TOKENS).input_ids
    return torch.tensor([ids + [PAD] * (TOKENS - len(ids))])


def _from_folder(model: Path) -> Any:
    from transformers import CLIPTextModel

    folder = model / "text_encoder"
    try:
        encoder = CLIPTextModel.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise OSDFaceError(f"{folder} cannot be loaded ({why}); {REMEDY}") from error
    return _checked(encoder, model.name)


def _from_checkpoint(path: Path) -> Any:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        tensors = read_tensors(path, (PREFIX,))
    except OSDFaceError as error:
        raise OSDFaceError(f"{path.name} has no text encoder ({error}); {REMEDY}") from error
    blocks = f"{PREFIX}transformer.resblocks."
    # Stable Diffusion 2 takes what the last block but one gives, through the final layer norm.
    last = max(
        (int(name[len(blocks) :].partition(".")[0]) for name in tensors if name.startswith(blocks)),
        default=0,
    )
    embedding = tensors.get(f"{PREFIX}token_embedding.weight")
    if embedding is None or not last:
        raise OSDFaceError(f"{path.name} has no text encoder of Stable Diffusion 2; {REMEDY}")
    vocabulary, width = embedding.shape
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=last,
        num_attention_heads=max(1, width // TEXT_HEAD_WIDTH),
        max_position_embeddings=TOKENS,
        hidden_act="gelu",
        projection_dim=512,
    )
    wanted = {name: t for name, t in tensors.items() if not name.startswith(f"{blocks}{last}.")}
    encoder: Any = CLIPTextModel(config)
    state = convert_open_clip_checkpoint(encoder, wanted, PREFIX)
    if not hasattr(encoder, "text_model"):
        state = {name.removeprefix("text_model."): t for name, t in state.items()}
    own = encoder.state_dict()
    wrong = [name for name in own if name not in state or state[name].shape != own[name].shape]
    if wrong:
        raise OSDFaceError(
            f"{path.name}'s text encoder does not fit Stable Diffusion 2.1-base ({some(wrong)}); "
            f"{REMEDY}"
        )
    encoder.load_state_dict({name: state[name].float() for name in own})
    return _checked(encoder, path.name)


def _checked(encoder: Any, source: str) -> Any:
    if encoder.config.hidden_size != TEXT_WIDTH:
        raise OSDFaceError(
            f"{source} has a text encoder of width {encoder.config.hidden_size} instead of "
            f"{TEXT_WIDTH}; {REMEDY}"
        )
    return encoder.eval().requires_grad_(False)
