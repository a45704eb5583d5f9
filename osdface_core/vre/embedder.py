"""The Visual Representation Embedder: face crops -> 77 x 1024 visual prompts (OSDFace, section 3.2).

A VQ encoder describes the degraded face by the entries of a learned code book; the 77 best matched distinct entries, widened to
the text width of Stable Diffusion 2.1, take the place of the text prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..chunks import Progress, in_chunks
from ..networks import Operations
from .encoder import FEATURES, Encoder

SIDE = 512
CODES = 1024
TOKENS = 77
WIDTH = 1024


class Projector(nn.Module):
    """(B,77,512) -> (B,77,1024): two 1x1 convolutions, each followed by SiLU (the last one too, as released)."""

    def __init__(self, operations: Operations = nn) -> None:
        super().__init__()
        self.conv1 = operations.Conv1d(FEATURES, 256, 1)
        self.conv2 = operations.Conv1d(256, WIDTH, 1)

    def forward(self, codes: Tensor) -> Tensor:
        h = F.silu(self.conv1(codes.transpose(1, 2)))
        return F.silu(self.conv2(h)).transpose(1, 2)


class CodeBook(nn.Module):
    def __init__(self, operations: Operations = nn) -> None:
        super().__init__()
        self.embedding = operations.Embedding(CODES, FEATURES)

    def entries(self, device: torch.device) -> Tensor:
        """All code vectors, (1024,512) fp32; through the layer, so that a host may cast or page it."""
        return self.embedding(torch.arange(CODES, device=device)).float()


class VisualEmbedder(nn.Module):
    """Face crops to visual prompts. Names of parameters: `encoder.*`, `quant_conv.*`, `quantize.embedding.weight`, `projector.*`."""

    def __init__(self, operations: Operations = nn) -> None:
        super().__init__()
        self.encoder = Encoder(operations)
        self.quant_conv = operations.Conv2d(FEATURES, FEATURES, 1)
        self.quantize = CodeBook(operations)
        self.projector = Projector(operations)

    def codes(self, crops: Tensor) -> Tensor:
        """The code book rows chosen for each crop. crops (B,3,H,W) in [0,1], any size; (B,77,512) fp32."""
        features = self.quant_conv(self.encoder(encoder_input(crops)))
        return choose_codes(features.float(), self.quantize.entries(crops.device))

    def forward(self, crops: Tensor) -> Tensor:
        """crops (B,3,H,W) in [0,1], any size; the prompts (B,77,1024), fp32."""
        return self.projector(self.codes(crops))


def embed(
    crops: Tensor,
    network: Callable[[int], tuple[VisualEmbedder, torch.device]],
    *,
    at_once: int = 1,
    out_of_memory: Callable[[BaseException], bool] = lambda error: False,
    progress: Progress | None = None,
) -> Tensor:
    """The visual prompts (N,77,1024) of crops (N,H,W,3) in [0,1], fp32, on the device of `crops`.

    network: called before each chunk with its number of faces; gives the embedder, ready, and the device that it computes on.
    at_once: faces in a chunk. progress: called with 1 for each face; what it raises ends the job.
    """
    prompts = torch.empty(len(crops), TOKENS, WIDTH, device=crops.device)
    pixels = crops.movedim(-1, 1)

    def work(part: slice) -> None:
        embedder, device = network(part.stop - part.start)
        prompts[part] = embedder(pixels[part].to(device)).to(prompts)
        for _ in range(part.start, part.stop):
            (progress or (lambda done: None))(1)

    in_chunks(len(crops), at_once, work, out_of_memory)
    return prompts


def encoder_input(crops: Tensor) -> Tensor:
    """(B,3,H,W) in [0,1] -> (B,3,512,512) in [-3,1], fp32, as the released code feeds its encoder.

    A square goes to 512 with corners aligned, anything else is squashed without; [-1,1] is then normalised once more, as if it were
    [0,1]. The released weights were trained on prompts made that way, so the range must stay.
    """
    x = crops.float().contiguous() * 2 - 1  # a picture arrives channels-last, where torch's group norm on the CPU is less exact
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=x.shape[-2] == x.shape[-1])
    return x * 2 - 1


def choose_codes(features: Tensor, book: Tensor, tokens: int = TOKENS) -> Tensor:
    """For each picture the `tokens` distinct code vectors with the smallest quantisation error, best first.

    features (B,C,H,W), book (K,C), both fp32; (B,tokens,C). Pictures that use fewer codes keep rows of zeros, as the released
    code leaves them. Each position proposes its nearest code; a code counts with its best position.
    """
    z = features.flatten(2).transpose(1, 2)
    distance = z.square().sum(2, keepdim=True) + book.square().sum(1) - 2 * z @ book.T
    error, code = distance.min(2)
    best = torch.full((z.shape[0], book.shape[0]), torch.inf, device=z.device)
    best.scatter_reduce_(1, code, error, "amin")
    best, order = best.sort(dim=1, stable=True)
    rows = book[order[:, :tokens]] * best[:, :tokens, None].isfinite()
    return F.pad(rows, (0, 0, 0, tokens - rows.shape[1]))
