"""The Visual Representation Embedder: face crops -> visual prompts (OSDFace, section 3.2).

A VQ encoder describes the degraded face by the entries of a learned code book. The 77 best matched
distinct entries, widened to the text width of Stable Diffusion 2.1, replace the text prompt.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...chunks import Progress, in_chunks, is_out_of_memory, no_progress
from ...cpu import optimized
from ...layers import Operations
from ...pictures.resampling import antialiased
from ...sd21.backbone import SIDE, TEXT_WIDTH, TOKENS
from .encoder import FULL, Encoder, Shape


class Projector(nn.Module):
    """Codes (B,77,features) -> prompts (B,77,1024): two 1x1 convolutions.

    SiLU follows each, the last one too, as released.
    """

    def __init__(self, operations: Operations = nn, shape: Shape = FULL) -> None:
        super().__init__()
        self.conv1 = operations.Conv1d(shape.features, shape.hidden, 1)
        self.conv2 = operations.Conv1d(shape.hidden, TEXT_WIDTH, 1)

    def forward(self, codes: Tensor) -> Tensor:
        h = F.silu(self.conv1(codes.transpose(1, 2)))
        return F.silu(self.conv2(h)).transpose(1, 2)


class CodeBook(nn.Module):
    def __init__(self, operations: Operations = nn, shape: Shape = FULL) -> None:
        super().__init__()
        self.codes = shape.codes
        self.embedding = operations.Embedding(shape.codes, shape.features)

    def entries(self, device: torch.device) -> Tensor:
        """All code vectors (codes,features) fp32.

        Taken through the layer, so that a host may cast or page it.
        """
        return self.embedding(torch.arange(self.codes, device=device)).float()


class VisualEmbedder(nn.Module):
    """Face crops -> visual prompts.

    Names of parameters: `encoder.*`, `quant_conv.*`, `quantize.embedding.weight`, `projector.*`.
    """

    def __init__(self, operations: Operations = nn, shape: Shape = FULL) -> None:
        super().__init__()
        self.side = shape.side
        self.encoder = Encoder(operations, shape)
        self.quant_conv = operations.Conv2d(shape.features, shape.features, 1)
        self.quantize = CodeBook(operations, shape)
        self.projector = Projector(operations, shape)

    def codes(self, crops: Tensor) -> Tensor:
        """Crops (B,3,H,W) in [0,1], any size -> the codes chosen for each, (B,77,features) fp32."""
        features = self.quant_conv(self.encoder(encoder_input(crops, self.side)))
        return choose_codes(features.float(), self.quantize.entries(crops.device))

    def forward(self, crops: Tensor) -> Tensor:
        """Crops (B,3,H,W) in [0,1], any size -> prompts (B,77,1024) fp32."""
        return self.projector(self.codes(crops))


def embed(
    crops: Tensor,
    network: Callable[[int], tuple[VisualEmbedder, torch.device]],
    *,
    at_once: int = 1,
    out_of_memory: Callable[[BaseException], bool] = is_out_of_memory,
    progress: Progress | None = None,
) -> Tensor:
    """The visual prompts (N,77,1024) fp32 of N crops, on their device.

    crops: (N,H,W,3) in [0,1].
    network: called before each chunk with its number of crops; gives the embedder, ready to run,
        and the device that it computes on.
    at_once: crops in a chunk.
    out_of_memory: tells whether an error says that fewer crops at once may work.
    progress: called with 1 and the crop (3,H,W) for each crop; what it raises ends the job.
    """
    prompts = torch.empty(len(crops), TOKENS, TEXT_WIDTH, device=crops.device)
    pixels = crops.movedim(-1, 1)

    def work(part: slice) -> None:
        embedder, device = network(part.stop - part.start)
        with optimized(device):
            prompts[part] = embedder(pixels[part].to(device)).to(prompts)
        for crop in pixels[part]:
            (progress or no_progress)(1, crop)

    in_chunks(len(crops), at_once, work, out_of_memory)
    return prompts


def encoder_input(crops: Tensor, side: int = SIDE) -> Tensor:
    """Crops (B,3,H,W) in [0,1] -> (B,3,side,side) in [-3,1] fp32, prepared as in the released code.

    A square is resized to 512 with corners aligned, any other crop is squashed to it without;
    [-1,1] is then normalised once more, as if it were [0,1]. The released weights were trained on
    prompts made so, so the range must stay. OSDFace's side is 512.
    """
    # Contiguous: a picture arrives channels-last, in which torch's group norm on the CPU is less
    # exact.
    x = crops.float().contiguous() * 2 - 1
    if x.shape[-2:] != (SIDE, SIDE):
        x = F.interpolate(
            x, (SIDE, SIDE), mode="bilinear", align_corners=x.shape[-2] == x.shape[-1]
        )
    if side != SIDE:
        x = antialiased(x, (side, side), "bilinear")
    return x * 2 - 1


def choose_codes(features: Tensor, book: Tensor, tokens: int = TOKENS) -> Tensor:
    """The `tokens` distinct code vectors of each picture with the smallest error, best first.

    features (B,C,H,W), book (K,C), both fp32 -> (B,tokens,C). Each position proposes its nearest
    code; the error of a code is that of its best position. A picture that uses fewer codes keeps
    rows of zeros, as in the released code.
    """
    z = features.flatten(2).transpose(1, 2)
    distance = z.square().sum(2, keepdim=True) + book.square().sum(1) - 2 * z @ book.T
    error, code = distance.min(2)
    best = torch.full((z.shape[0], book.shape[0]), torch.inf, device=z.device)
    best.scatter_reduce_(1, code, error, "amin")
    best, order = best.sort(dim=1, stable=True)
    rows = book[order[:, :tokens]] * best[:, :tokens, None].isfinite()
    return F.pad(rows, (0, 0, 0, tokens - rows.shape[1]))
