"""The vector-quantised autoencoders of stage 1: the visual embedder's encoder and code book, and a
decoder that mirrors the encoder.

Names of parameters are those of OSDFace's checkpoint: `encoder.*`, `quant_conv.*`,
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
    """One resolution of the decoder: three blocks, each followed by attention at the first level,
    then an upsampling if there is more.
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
    """picture (B,3,side,side) in about [-1,1]; features (B,C,16,16) before quantisation;
    commitment, codebook: the two parts of the quantiser's loss; codes (B,16,16): which entries were
    taken.
    """

    picture: Tensor
    features: Tensor
    commitment: Tensor
    codebook: Tensor
    codes: Tensor


class Quantizer(nn.Module):
    """Each position's features become the nearest entry of the code book; the gradient passes as if
    they had not.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = Embedding(shape.codes, shape.features)
        nn.init.uniform_(self.embedding.weight, -1 / shape.codes, 1 / shape.codes)
        self.register_buffer("uses", torch.zeros(shape.codes))
        self.uses: Tensor

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(what is decoded, commitment loss, code book loss, codes). Distances in fp32: squares of
        lower precision choose other codes.
        """
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
                module.norm2.requires_grad_(
                    False
                )  # never used; kept because the released checkpoint has it

    def forward(self, pictures: Tensor) -> Coded:
        """pictures (B,3,side,side), in the range that the encoder is trained for."""
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
        """What a file holds of it."""
        return {
            name: tensor for name, tensor in self.state_dict().items() if name != "quantize.uses"
        }


def association(hq: Tensor, lq: Tensor, scale: Tensor | float) -> Tensor:
    """How badly the features of a good face and of its degraded copy find each other among all
    others of the batch.

    hq, lq (B,C,H,W), pre-quantisation. Both are brought to length 1; S = scale * hq . lq over all
    B*H*W positions; the mean of the cross entropies of its rows and of its columns with the
    diagonal (DAEFR, Tsai et al. 2024, after CLIP).
    """
    a, b = (F.normalize(v.movedim(1, -1).flatten(0, -2), dim=1) for v in (hq, lq))
    similarity = scale * a @ b.T
    right = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(similarity, right) + F.cross_entropy(similarity.T, right)) / 2
