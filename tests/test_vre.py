"""The visual embedder against the released code's outputs and against its own definition written
out plainly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from osdface_core.errors import OSDFaceError
from osdface_core.osdface.vre import VisualEmbedder, build_embedder, choose_codes, read_embedder

INPUTS = ("astronaut_lq", "portrait_severe_lq", "portrait_128", "portrait_512x640", "many_codes")


@pytest.fixture(scope="module")
def released(seeded: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two released files, as the released code reads them."""
    folder = tmp_path_factory.mktemp("vre")
    torch.save(seeded.vre_checkpoint(), folder / "associate_2.ckpt")
    torch.save(seeded.embedding_change(), folder / "embedding_change_weights.pth")
    return folder


@pytest.fixture(scope="module")
def network(released: Path) -> VisualEmbedder:
    return build_embedder(read_embedder(released / "associate_2.ckpt"))


def sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack(sorted(rows, key=lambda row: row.tolist()))


@pytest.mark.parametrize("name", INPUTS)
@torch.inference_mode()
def test_codes_and_prompts_are_the_released_codes(
    name: str,
    network: VisualEmbedder,
    truth: Callable[[str], torch.Tensor],
    crop: Callable[[str], torch.Tensor],
) -> None:
    pixels = crop(name).movedim(-1, 1)
    codes, wanted = network.codes(pixels)[0], truth(f"{name}.codes")[0]
    assert {tuple(row) for row in codes.tolist()} == {tuple(row) for row in wanted.tolist()}
    assert (codes.abs().sum(1) == 0).sum() == (wanted.abs().sum(1) == 0).sum()
    prompts = sorted_rows(network(pixels)[0])
    assert (prompts - sorted_rows(truth(f"{name}.prompt")[0])).abs().max() < 1e-5


@torch.inference_mode()
def test_a_batch_of_crops_is_each_crop_alone(
    network: VisualEmbedder, crop: Callable[[str], torch.Tensor]
) -> None:
    crops = torch.cat([crop(name) for name in ("astronaut_lq", "many_codes")]).movedim(-1, 1)
    together = network(crops)
    for pixels, prompts in zip(crops, together, strict=True):
        assert (sorted_rows(network(pixels[None])[0]) - sorted_rows(prompts)).abs().max() < 1e-5


def chosen_by_definition(features: torch.Tensor, book: torch.Tensor, tokens: int) -> torch.Tensor:
    """Walk the positions from the best matched on, keep each code once, stop when full; the rest
    stays zero.
    """
    z = features.flatten(1).T
    distance = torch.cdist(z.double(), book.double())
    error, code = distance.min(1)
    kept: list[int] = []
    for position in error.argsort().tolist():
        if int(code[position]) not in kept and len(kept) < tokens:
            kept.append(int(code[position]))
    out = torch.zeros(tokens, book.shape[1])
    out[: len(kept)] = book[kept]
    return out


@pytest.mark.parametrize(("codes", "spread"), [(1024, 1.0), (30, 1.0), (1024, 1e-3), (100, 0.3)])
def test_codes_are_chosen_by_their_best_match(codes: int, spread: float) -> None:
    rng = torch.Generator().manual_seed(codes)
    book = torch.randn(codes, 12, generator=rng)
    features = spread * torch.randn(3, 12, 16, 16, generator=rng)
    chosen = choose_codes(features, book, 77)
    for one, features_of_one in zip(chosen, features, strict=True):
        assert torch.equal(one, chosen_by_definition(features_of_one, book, 77))


def test_one_safetensors_file_holds_both_parts(
    released: Path, network: VisualEmbedder, tmp_path: Path
) -> None:
    save_file(network.state_dict(), tmp_path / "osdface_vre.safetensors")
    again = build_embedder(read_embedder(tmp_path / "osdface_vre.safetensors"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True)
    )


def test_the_projector_must_lie_beside_the_checkpoint(released: Path, tmp_path: Path) -> None:
    (tmp_path / "associate_2.ckpt").symlink_to(released / "associate_2.ckpt")
    with pytest.raises(
        OSDFaceError,
        match=r"associate_2.ckpt holds no projector: put embedding_change_weights.pth beside it",
    ):
        read_embedder(tmp_path / "associate_2.ckpt")


def test_weights_in_half_precision_are_searched_in_fp32(released: Path) -> None:
    state = {name: t.half() for name, t in read_embedder(released / "associate_2.ckpt").items()}
    with torch.inference_mode():
        prompts = build_embedder(state)(torch.rand(1, 3, 64, 64))
    assert prompts.dtype == torch.float32


def test_a_missing_or_misshapen_tensor_is_named(released: Path) -> None:
    state = read_embedder(released / "associate_2.ckpt")
    state["encoder.conv_in.bias"] = torch.full((64,), torch.nan)
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"][:32]
    del state["quant_conv.bias"]
    says = (
        r"conv_in.weight is \(32, 3, 3, 3\) instead of \(64, 3, 3, 3\); "
        r"encoder.conv_in.bias is not finite; quant_conv.bias is missing"
    )
    with pytest.raises(OSDFaceError, match=says):
        build_embedder(state)
