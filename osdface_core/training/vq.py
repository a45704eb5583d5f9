"""The vector-quantised autoencoders of stage 1: the visual embedder's encoder and code book, and a
decoder that mirrors the encoder.

The parameters' names are those of OSDFace's checkpoint: `encoder.*`, `quant_conv.*`,
`quantize.embedding.weight`, `post_quant_conv.*`, `decoder.*`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, autocast, nn
from torch.nn import Conv2d, Embedding, GroupNorm

from ..osdface.vre import Shape
from ..osdface.vre.encoder import NORM_GROUPS, Attention, Encoder, Middle, ResnetBlock


class Upsample(nn.Module):
    """(B,C,H,W) -> (B,C,2H,2W): nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UpLevel(nn.Module):
    """One resolution of the decoder: three blocks, at the first level each with attention after it,
    and an upsampling except at the last level.
    """

    def __init__(self, channels: int, out: int, first: bool, last: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            [ResnetBlock(channels, out, nn), *(ResnetBlock(out, out, nn) for _ in range(2))]
        )
        self.attn = nn.ModuleList([Attention(out, nn) for _ in self.block] if first else [])
        if not last:
            self.upsample = Upsample(out)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(x) if hasattr(self, "upsample") else x


class Decoder(nn.Module):
    """(B,features,16,16) -> (B,3,side,side), after VQGAN's (Esser et al. 2021)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        widths = [shape.channels * m for m in shape.multipliers]
        self.conv_in = Conv2d(shape.features, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], nn)
        # up.0 works at the full resolution, as down.0 does.
        self.up = nn.ModuleList(
            UpLevel(before, width, first=i == len(widths) - 1, last=i == 0)
            for i, (width, before) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out = GroupNorm(NORM_GROUPS, widths[0], eps=1e-6)
        self.conv_out = Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@dataclass(frozen=True)
class Coded:
    """What an autoencoder makes of pictures.

    picture: decoded, (B,3,side,side) in about [-1,1].
    features: before quantisation, (B,C,16,16).
    commitment: loss that draws the features to their codes.
    codebook: loss that draws the codes to their features.
    codes: indices of the code book's entries, (B,16,16).
    """

    picture: Tensor
    features: Tensor
    commitment: Tensor
    codebook: Tensor
    codes: Tensor


class Quantizer(nn.Module):
    """Replaces each position's features by the nearest code; the gradient passes straight through
    (van den Oord et al. 2017).
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = Embedding(shape.codes, shape.features)
        nn.init.uniform_(self.embedding.weight, -1 / shape.codes, 1 / shape.codes)
        self.register_buffer("uses", torch.zeros(shape.codes))
        self.uses: Tensor

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B,C,h,w) -> (what is decoded, commitment loss, code book loss, codes)."""
        # In fp32: distances of lower precision choose other codes.
        with autocast(features.device.type, enabled=False):
            features = features.float()
            z = features.movedim(1, -1)
            book = self.embedding.weight.float()
            with torch.no_grad():
                flat = z.reshape(-1, z.shape[-1])
                distance = book.square().sum(1) - 2 * flat @ book.T
                codes = distance.argmin(1).view(z.shape[:-1])
            chosen = F.embedding(codes, book)
            commitment = (chosen.detach() - z).square().mean()
            codebook = (chosen - z.detach()).square().mean()
            return (z + (chosen - z).detach()).movedim(-1, 1), commitment, codebook, codes


class VQAutoencoder(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = Encoder(nn, shape)
        self.quant_conv = Conv2d(shape.features, shape.features, 1)
        self.quantize = Quantizer(shape)
        self.post_quant_conv = Conv2d(shape.features, shape.features, 1)
        self.decoder = Decoder(shape)
        for module in self.modules():
            if isinstance(module, Attention):
                # Never used; the released checkpoint has it.
                module.norm2.requires_grad_(False)

    def forward(self, pictures: Tensor) -> Coded:
        """pictures: (B,3,side,side) in the range that the encoder is trained for."""
        features = self.quant_conv(self.encoder(pictures))
        chosen, commitment, codebook, codes = self.quantize(features)
        return Coded(
            self.decoder(self.post_quant_conv(chosen)).float(),
            features.float(),
            commitment,
            codebook,
            codes,
        )

    def weights(self) -> dict[str, Tensor]:
        """The tensors that an exported file holds."""
        return {
            name: tensor for name, tensor in self.state_dict().items() if name != "quantize.uses"
        }


def association(hq: Tensor, lq: Tensor, scale: Tensor | float) -> Tensor:
    """Contrastive loss between the features of good faces and of their degraded copies (DAEFR, Tsai
    et al. 2024, after CLIP): each position is to be nearest to its counterpart of all in the batch.

    With the features normalised to length 1 and S = scale * hq . lq over all B*H*W positions, it is
    the mean of the cross entropies of S's rows and columns with the diagonal.

    hq: features of good faces before quantisation, (B,C,H,W).
    lq: of the degraded copies.
    scale: 1 / temperature.
    """
    a, b = (F.normalize(v.movedim(1, -1).flatten(0, -2), dim=1) for v in (hq, lq))
    similarity = scale * a @ b.T
    right = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, right) + F.cross_entropy(similarity.T, right)) / 2
