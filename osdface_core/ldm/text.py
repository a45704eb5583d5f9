"""The text encoder of Stable Diffusion 2.1-base, for the empty text, which needs no tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..sd21.backbone import BEGIN, END, PAD, TEXT_HEAD_WIDTH, TEXT_WIDTH, TOKENS
from ..sd21.base_model import REMEDY, TEXT_PREFIX
from ..weights.reading import read_tensors
from .layers import LayerNorm, Linear
from .loading import build

BLOCKS = "transformer.resblocks."


class CausalAttention(nn.Module):
    """Attention of (B,n,width) over itself and what is before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width), requires_grad=False)
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width), requires_grad=False)
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        projected = F.linear(x, self.in_proj_weight.to(x), self.in_proj_bias.to(x))
        q, k, v = projected.unflatten(2, (3, -1, TEXT_HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """(B,n,width) -> (B,n,width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = CausalAttention(width)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.ModuleDict(
            {"c_fc": Linear(width, 4 * width), "c_proj": Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Transformer(nn.Module):
    """The blocks alone, by their names in the checkpoint."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(blocks))


class Embedding(nn.Module):
    """Tokens (B,n) -> (B,n,width) fp32."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight).float()


class TextEncoder(nn.Module):
    """OpenCLIP's: tokens (B,77) -> the last hidden state (B,77,width) that the UNet takes."""

    def __init__(self, vocabulary: int, width: int, blocks: int) -> None:
        super().__init__()
        self.token_embedding = Embedding(vocabulary, width)
        places = torch.empty(TOKENS, width)
        self.positional_embedding = nn.Parameter(places, requires_grad=False)
        self.transformer = Transformer(width, blocks)
        self.ln_final = LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_final(x)


@torch.no_grad()
def empty_text(path: Path) -> Tensor:
    """What the text encoder of a checkpoint gives for the empty text, (1,77,1024) fp32, on the CPU.

    Nothing but the text encoder is read. Raises OSDFaceError for a file without that of Stable
    Diffusion 2.
    """
    try:
        found = read_tensors(path, (TEXT_PREFIX,))
    except OSDFaceError as error:
        raise OSDFaceError(f"{path.name} has no text encoder ({error}); {REMEDY}") from error
    tensors = {name.removeprefix(TEXT_PREFIX): tensor for name, tensor in found.items()}
    # Stable Diffusion 2 takes what the last block but one gives, through the final layer norm.
    last = max(
        (int(name[len(BLOCKS) :].partition(".")[0]) for name in tensors if name.startswith(BLOCKS)),
        default=0,
    )
    table = tensors.get("token_embedding.weight")
    if table is None or not last or table.shape[1:] != (TEXT_WIDTH,):
        raise OSDFaceError(f"{path.name} has no text encoder of Stable Diffusion 2; {REMEDY}")
    vocabulary, width = table.shape
    encoder = build(lambda: TextEncoder(vocabulary, width, last), tensors, path.name)
    tokens = torch.tensor([[BEGIN, END] + [PAD] * (TOKENS - 2)])
    hidden: Tensor = encoder(tokens)
    return hidden.clone()
