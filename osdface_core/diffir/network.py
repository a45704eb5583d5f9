"""DiffIR's networks: a prior of 256 numbers by diffusion, and the transformer that it steers.

Xia et al., "DiffIR: Efficient Diffusion Model for Image Restoration", ICCV 2023; this is its second
stage, which needs no ground truth. Parameters have the names of the released files. Everything that
differs between the released networks is read off the tensors' shapes.
"""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OSDFaceError
from ..layers import Operations, load_network

PRIOR = 256
CPEN_WIDTH = 64
SLOPE = 0.1
LEVELS = 4
EPSILON = 1e-5
# The steps of the diffusion, and the ends of its schedule: beta is linear in its square root.
STEPS = 4
BETAS = 0.1, 0.99
# The denoiser sees the step's number over this.
MAX_PERIOD = 10 * STEPS
# What the tail of a network for super-resolution enlarges by; a smaller job unshuffles its input.
TAIL_SCALE = 4
# The networks' own scale: three halvings.
GRAIN = 2 ** (LEVELS - 1)

UPSCALE, DEBLUR, INPAINT = "upscale", "deblur", "inpaint"
REMEDY = (
    "load a file of DiffIR's second stage (DiffIRS2), as downloaded or as install.py --from made "
    "it."
)

# What a file's weights hold beside the released names where the network gets holes prefilled.
PREFILLED = "G.prefilled"

# Pixels, of the gathered picture, of which the condition is read at once: 1 KB for each and layer.
AT_ONCE = 2**18

# Called often while a network works; what it raises ends the work.
Tick = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """What differs between the released networks.

    job: UPSCALE, DEBLUR or INPAINT.
    scale: of the result's sides.
    unshuffle: pixels a side that the transformer's input gathers into one.
    gather: the same of the network that reads the condition.
    channels: of the input, the mask among them.
    width: channels at the finest level; each further level has twice as many.
    blocks: transformer blocks at each level, going down and coming up.
    refinement: blocks after the last level.
    heads: of attention, at each level.
    hidden: width of the gated layer, at each level.
    centred: whether norms subtract the mean and have a bias.
    residuals: residual blocks of the network that reads the condition.
    prefilled: whether it gets holes with a smooth fill and adds to that; no released network does.
    """

    job: str
    scale: int
    unshuffle: int
    gather: int
    channels: int
    width: int
    blocks: tuple[int, ...]
    refinement: int
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    centred: bool
    residuals: int
    prefilled: bool = False

    @property
    def multiple(self) -> int:
        """The sides of the input are multiples of this."""
        return GRAIN * self.unshuffle


def read_shape(tensors: Mapping[str, Tensor], source: str) -> Shape:
    """The network that `tensors` are of, by the names in the released files.

    Raises OSDFaceError for tensors of anything else. source: the file's name.
    """

    def misfit(why: str) -> OSDFaceError:
        return OSDFaceError(f"{source} does not hold DiffIR's weights ({why}): {REMEDY}")

    def size(name: str, axis: int) -> int:
        if name not in tensors or tensors[name].ndim <= axis:
            raise misfit(f"{name} is missing")
        return tensors[name].shape[axis]

    def count(prefix: str) -> int:
        found = {
            name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)
        }
        return len(found)

    given = size("G.patch_embed.proj.weight", 1)
    gathered = size("condition.E.0.weight", 1)
    if "G.tail.1.weight" in tensors:
        unshuffle = math.isqrt(given // 3)
        if given != 3 * unshuffle**2 or unshuffle not in (1, 2, 4):
            raise misfit(f"its first layer takes {given} channels")
        job, scale, channels = UPSCALE, TAIL_SCALE // unshuffle, 3
    elif "G.output.weight" in tensors and given in (3, 4):
        unshuffle, scale, channels = 1, 1, given
        job = DEBLUR if given == 3 else INPAINT
    else:
        raise misfit("its last layer is none of DiffIR's")
    gather = math.isqrt(gathered // channels)
    if gathered != channels * gather**2 or gather not in (1, 2, 4):
        raise misfit(f"the first layer of its condition takes {gathered} channels")
    down = [f"G.encoder_level{level}." for level in range(1, LEVELS)] + ["G.latent."]
    return Shape(
        job=job,
        scale=scale,
        unshuffle=unshuffle,
        gather=gather,
        channels=channels,
        width=size("G.patch_embed.proj.weight", 0),
        blocks=tuple(map(count, down)),
        refinement=count("G.refinement."),
        heads=tuple(size(f"{level}0.attn.temperature", 0) for level in down),
        hidden=tuple(size(f"{level}0.ffn.project_out.weight", 1) for level in down),
        centred="G.encoder_level1.0.norm1.body.bias" in tensors,
        # Each convolution of the condition is followed by a layer without weights, a block is not.
        residuals=sum(
            f"condition.E.{i}.body.0.weight" in tensors for i in range(2, 2 + count("condition.E."))
        ),
        prefilled=PREFILLED in tensors,
    )


def build_network(
    tensors: dict[str, Tensor], operations: Operations = nn, source: str = "The file"
) -> DiffIR:
    """A DiffIR ready to run, in fp32. Raises OSDFaceError if the tensors are none of DiffIR's.

    tensors: by the names in the released files, without prefixes.
    operations: the layers to build it of.
    source: the file's name, for errors.
    """
    shape = read_shape(tensors, source)
    return load_network(
        lambda: DiffIR(shape, operations), tensors, f"{source} does not fit DiffIR", REMEDY
    )


def start_vector(seed: int = 0) -> Tensor:
    """The vector (1,256) that diffusion starts from: a draw from the normal distribution.

    The released code draws another at each run; this is its draw on a CPU after manual_seed(seed).
    """
    return torch.randn(1, PRIOR, generator=torch.Generator().manual_seed(seed))


def posterior(step: int) -> tuple[float, float]:
    """What the next vector is made of: shares of the predicted end and of the present vector.

    The mean of the posterior (Ho et al. 2020, equation 7) at a step of 0..3.
    """
    beta, before = _betas()[step], signal(step)
    after = before * (1 - beta)
    return (
        beta * math.sqrt(before) / (1 - after),
        (1 - before) * math.sqrt(1 - beta) / (1 - after),
    )


def signal(steps: int) -> float:
    """The share of a vector's variance that is still its own after so many steps of noising."""
    return math.prod(1 - beta for beta in _betas()[:steps])


def _betas() -> list[float]:
    low, high = (math.sqrt(beta) for beta in BETAS)
    return [(low + (high - low) * i / (STEPS - 1)) ** 2 for i in range(STEPS)]


class _Modulated(nn.Module):
    """A norm's output, scaled and shifted by what the prior says of each channel."""

    def __init__(self, width: int, operations: Operations) -> None:
        super().__init__()
        self.kernel = nn.Sequential(operations.Linear(PRIOR, 2 * width, bias=False))

    def modulation(self, prior: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.kernel(prior)[:, None, None].chunk(2, -1)
        return scale, shift


class _Body(nn.Module):
    def __init__(self, width: int, centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if centred else None


class Norm(nn.Module):
    """A norm over the channels of each pixel, then a scale and a shift: (B,C,H,W) -> (B,C,H,W).

    Without a bias the mean counts in the variance and is yet not subtracted, as the released code
    has it.
    """

    def __init__(self, width: int, centred: bool) -> None:
        super().__init__()
        self.body = _Body(width, centred)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        pixels = x.movedim(1, -1)
        weight = self.body.weight.to(x)
        if self.body.bias is not None:
            bias = self.body.bias.to(x)
            pixels = F.layer_norm(pixels, weight.shape, weight, bias, EPSILON)
        else:
            if torch.is_grad_enabled():
                variance = pixels.var(-1, correction=0, keepdim=True)
                deviation = (variance + EPSILON).rsqrt()
            else:
                # The layer norm's by-product, which has no gradient; var takes ten times as long
                # as a whole layer norm.
                *_, deviation = torch.native_layer_norm(pixels, weight.shape, None, None, EPSILON)
            pixels, scale = pixels * deviation.to(x), scale * weight
        return torch.addcmul(shift, pixels, scale).movedim(-1, 1)


class Attention(_Modulated):
    """Attention among channels (Zamir et al. 2022), over all pixels: (B,C,H,W) -> (B,C,H,W)."""

    def __init__(self, width: int, heads: int, operations: Operations) -> None:
        super().__init__(width, operations)
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = operations.Conv2d(width, 3 * width, 1, bias=False)
        self.qkv_dwconv = operations.Conv2d(
            3 * width, 3 * width, 3, padding=1, groups=3 * width, bias=False
        )
        self.project_out = operations.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        joined = self.qkv_dwconv(self.qkv(x)).movedim(1, -1).flatten(1, 2)
        channels = joined.shape[-1] // 3
        q, k = (
            part.unflatten(1, (self.heads, -1))
            for part in _transposed(joined[..., : 2 * channels].to(_summing(x))).chunk(2, 1)
        )
        v = joined[..., 2 * channels :].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        # The lengths of q and k divide their products, which are few, instead of their pixels.
        cosines = q @ k.mT / (_lengths(q) * _lengths(k).mT)
        shares = (cosines * self.temperature.to(cosines)).softmax(-1).to(v)
        mixed = (v @ shares.mT).transpose(1, 2).flatten(2)
        return self.project_out(mixed.unflatten(1, (height, width)).movedim(-1, 1))


def _summing(x: Tensor) -> torch.dtype:
    """The precision in which sums over all of a picture's pixels are held: fp32, or finer.

    They are beyond half precision's range.
    """
    return torch.promote_types(x.dtype, torch.float32)


def _transposed(x: Tensor) -> Tensor:
    """(B,N,C) -> (B,C,N), contiguous: in another order torch's sums over N round otherwise than the
    released code's, by up to 6e-5 of the result.
    """
    # torch has a fast way for the exact transpose of a contiguous matrix.
    made = [part.contiguous().t().contiguous()[None] for part in x]
    return made[0] if len(made) == 1 else torch.cat(made)


def _lengths(x: Tensor) -> Tensor:
    """The lengths (...,C,1) of the vectors (...,C,N)."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


class FeedForward(_Modulated):
    """A gated layer: (B,C,H,W) -> (B,C,H,W)."""

    def __init__(self, width: int, hidden: int, operations: Operations) -> None:
        super().__init__(width, operations)
        self.project_in = operations.Conv2d(width, 2 * hidden, 1, bias=False)
        self.dwconv = operations.Conv2d(
            2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=False
        )
        self.project_out = operations.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dwconv(self.project_in(x)).chunk(2, 1)
        return self.project_out(F.gelu(gate).mul_(value))


class Block(nn.Module):
    """Attention and a gated layer, each added to its input: (B,C,H,W) -> (B,C,H,W)."""

    def __init__(
        self, width: int, heads: int, hidden: int, centred: bool, operations: Operations
    ) -> None:
        """A block of random weights.

        width: its channels.
        heads: of attention.
        hidden: channels of the gated layer.
        centred: as in Shape.
        operations: the layers to build it of.
        """
        super().__init__()
        self.norm1 = Norm(width, centred)
        self.attn = Attention(width, heads, operations)
        self.norm2 = Norm(width, centred)
        self.ffn = FeedForward(width, hidden, operations)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x, *self.attn.modulation(prior)))
        return x + self.ffn(self.norm2(x, *self.ffn.modulation(prior)))


def _resized(width: int, out: int, layer: nn.Module, operations: Operations) -> nn.Module:
    convolution = operations.Conv2d(width, out, 3, padding=1, bias=False)
    return nn.Sequential(OrderedDict(body=nn.Sequential(convolution, layer)))


class Transformer(nn.Module):
    """The U-shaped transformer: (B,channels,H,W) and the prior (B,256) -> (B,3,H*scale,W*scale).

    H and W are multiples of Shape.multiple.
    """

    def __init__(self, shape: Shape, operations: Operations) -> None:
        super().__init__()
        self.shape = shape
        widths = [shape.width * 2**level for level in range(LEVELS)]
        given = shape.channels * shape.unshuffle**2
        first = operations.Conv2d(given, widths[0], 3, padding=1, bias=False)
        self.patch_embed = nn.Sequential(OrderedDict(proj=first))

        def blocks(level: int, count: int, like: int | None = None) -> nn.ModuleList:
            """Blocks of a level, as wide as the level `like`."""
            wide = level if like is None else like
            return nn.ModuleList(
                Block(
                    widths[wide], shape.heads[level], shape.hidden[wide], shape.centred, operations
                )
                for _ in range(count)
            )

        counts = shape.blocks
        self.encoder_level1 = blocks(0, counts[0])
        self.encoder_level2 = blocks(1, counts[1])
        self.encoder_level3 = blocks(2, counts[2])
        self.latent = blocks(3, counts[3])
        self.decoder_level3 = blocks(2, counts[2])
        self.decoder_level2 = blocks(1, counts[1])
        self.decoder_level1 = blocks(0, counts[0], like=1)
        self.refinement = blocks(0, shape.refinement, like=1)

        def down(level: int) -> nn.Module:
            return _resized(widths[level], widths[level] // 2, nn.PixelUnshuffle(2), operations)

        def up(level: int) -> nn.Module:
            return _resized(widths[level], widths[level] * 2, nn.PixelShuffle(2), operations)

        self.down1_2, self.down2_3, self.down3_4 = down(0), down(1), down(2)
        self.up4_3, self.up3_2, self.up2_1 = up(3), up(2), up(1)
        self.reduce_chan_level3 = operations.Conv2d(widths[3], widths[2], 1, bias=False)
        self.reduce_chan_level2 = operations.Conv2d(widths[2], widths[1], 1, bias=False)
        last = widths[1]
        if shape.job == UPSCALE:
            enlarging = (
                operations.Conv2d(last, 4 * last, 3, padding=1),
                nn.PixelShuffle(2),
                operations.Conv2d(last, 4 * last, 3, padding=1),
                nn.PixelShuffle(2),
            )
            to_rgb = operations.Conv2d(last, 3, 3, padding=1)
            self.tail = nn.Sequential(nn.Sequential(*enlarging), to_rgb)
        else:
            self.output = operations.Conv2d(last, 3, 3, padding=1, bias=False)
        if shape.prefilled:
            self.register_buffer("prefilled", torch.ones(1))

    def forward(self, lq: Tensor, prior: Tensor, tick: Tick) -> Tensor:
        def through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            # Channels last, for the norms; a pixel shuffle gives channels first.
            x = x.contiguous(memory_format=torch.channels_last)
            for block in blocks:
                tick()
                x = block(x, prior)
            return x

        fine = through(self.encoder_level1, self.patch_embed(_gathered(lq, self.shape.unshuffle)))
        middle = through(self.encoder_level2, self.down1_2(fine))
        coarse = through(self.encoder_level3, self.down2_3(middle))
        x = self.up4_3(through(self.latent, self.down3_4(coarse)))
        x = self.reduce_chan_level3(torch.cat([x, coarse], 1))
        x = self.up3_2(through(self.decoder_level3, x))
        x = self.reduce_chan_level2(torch.cat([x, middle], 1))
        x = self.up2_1(through(self.decoder_level2, x))
        x = through(self.decoder_level1, torch.cat([x, fine], 1))
        x = through(self.refinement, x)
        tick()
        if self.shape.job == UPSCALE:
            return self.tail(x).add_(_repeated(lq, self.shape.scale))
        x = self.output(x)
        adds = self.shape.job == DEBLUR or self.shape.prefilled
        return x.add_(lq[:, :3]) if adds else x


def _gathered(x: Tensor, side: int) -> Tensor:
    return x if side == 1 else F.pixel_unshuffle(x, side)


def _repeated(x: Tensor, scale: int) -> Tensor:
    return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="nearest")


class _Residual(nn.Module):
    def __init__(self, operations: Operations) -> None:
        super().__init__()
        first, second = (operations.Conv2d(CPEN_WIDTH, CPEN_WIDTH, 3, padding=1) for _ in range(2))
        self.body = nn.Sequential(first, nn.LeakyReLU(SLOPE), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Condition(nn.Module):
    """CPEN: what a picture says about its prior, (B,channels,H,W) -> (B,256).

    Convolutions and a mean over the picture. A large one is read in strips that see as far beyond
    their edges as the convolutions do, so that the mean is that of the whole.
    """

    def __init__(self, shape: Shape, operations: Operations) -> None:
        super().__init__()
        self.gather = shape.gather
        widths = CPEN_WIDTH, 2 * CPEN_WIDTH, 2 * CPEN_WIDTH, PRIOR
        layers: list[nn.Module] = [
            operations.Conv2d(shape.channels * shape.gather**2, CPEN_WIDTH, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            *(_Residual(operations) for _ in range(shape.residuals)),
        ]
        for width, wider in itertools.pairwise(widths):
            layers += operations.Conv2d(width, wider, 3, padding=1), nn.LeakyReLU(SLOPE)
        self.E = nn.Sequential(*layers)
        # Pixels that a result sees to each side: one for each convolution.
        self.reach = 1 + 2 * shape.residuals + 3
        self.mlp = nn.Sequential(
            operations.Linear(PRIOR, PRIOR),
            nn.LeakyReLU(SLOPE),
            operations.Linear(PRIOR, PRIOR),
            nn.LeakyReLU(SLOPE),
        )

    def forward(self, lq: Tensor, tick: Tick, at_once: int) -> Tensor:
        x = _gathered(lq, self.gather)
        height, width = x.shape[2:]
        # Half precision could not hold a large picture's sum.
        total = x.new_zeros(len(x), PRIOR, dtype=_summing(x))
        for top, bottom in _strips(height, max(1, at_once // width)):
            tick()
            first = max(0, top - self.reach)
            seen = self.E(x[:, :, first : bottom + self.reach])
            own = seen[:, :, top - first : bottom - first].contiguous()
            total += own.sum((2, 3), dtype=total.dtype)
        return self.mlp((total / (height * width)).to(x))


def _strips(height: int, rows: int) -> Iterator[tuple[int, int]]:
    for top in range(0, height, rows):
        yield top, min(top + rows, height)


class _Denoiser(nn.Module):
    """Predicts the end of the diffusion: condition, step and vector, (B,513) -> (B,256)."""

    def __init__(self, operations: Operations) -> None:
        super().__init__()
        second = nn.Sequential(
            OrderedDict(resmlp=nn.Sequential(operations.Linear(PRIOR, PRIOR), nn.LeakyReLU(SLOPE)))
        )
        self.resmlp = nn.Sequential(
            operations.Linear(2 * PRIOR + 1, PRIOR), nn.LeakyReLU(SLOPE), second
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.resmlp(x)


class DiffIR(nn.Module):
    """The whole: `prior` reads a picture, `restore` restores it, or a tile of it, by the prior."""

    def __init__(self, shape: Shape, operations: Operations = nn) -> None:
        super().__init__()
        self.shape = shape
        self.G = Transformer(shape, operations)
        self.condition = Condition(shape, operations)
        self.denoise = _Denoiser(operations)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that it computes in."""
        return next(self.G.parameters()).dtype

    def priors(self, condition: Tensor, start: Tensor) -> list[Tensor]:
        """The vectors (B,256) after each of the four steps; the last is the prior.

        condition: (B,256).
        start: (1,256) or (B,256), of about unit variance.
        """
        x, found = start.to(condition).expand_as(condition), []
        for step in reversed(range(STEPS)):
            number = torch.full_like(condition[:, :1], step / MAX_PERIOD)
            end = self.denoise(torch.cat([condition, number, x], 1))
            of_end, of_present = posterior(step)
            x = of_end * end + of_present * x
            found.append(x)
        return found

    def prior(
        self, lq: Tensor, start: Tensor, tick: Tick = lambda: None, at_once: int = AT_ONCE
    ) -> Tensor:
        """The prior (B,256) of whole pictures (B,channels,H,W) in [0,1].

        lq: its sides are multiples of Shape.multiple.
        start: (1,256) or (B,256).
        tick: see Tick.
        at_once: pixels, of the gathered picture, that are read at once.
        """
        return self.priors(self.condition(lq, tick, at_once), start)[-1]

    def restore(self, lq: Tensor, prior: Tensor, tick: Tick = lambda: None) -> Tensor:
        """(B,channels,H,W) in [0,1] -> (B,3,H*scale,W*scale), not clamped.

        lq: a picture or a tile; its sides are multiples of Shape.multiple. For INPAINT its holes
            are 0, or filled smoothly where Shape.prefilled, and its fourth channel is 1 in them.
        prior: (B,256).
        tick: see Tick.
        """
        result: Tensor = self.G(lq, prior, tick)
        return result
