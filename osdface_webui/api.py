"""POST /osdface/v1/restore and /osdface/v1/faces, beside the host's own API."""

from __future__ import annotations

import base64
import binascii
import io
import secrets
from typing import Any, Optional

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules.api.api import decode_base64_to_image
from PIL import Image, ImageOps
from pydantic import BaseModel, Field

from osdface_core.errors import OSDFaceError

from . import host
from .extras import options_of
from .job import DEFAULT, MENUS, NAMES, look, restore_picture

# Typing and constraints are written so that pydantic 1 and 2 both read them.


def _one_of(name: str) -> Any:
    return Field(getattr(DEFAULT, name), description=f"one of: {', '.join(MENUS[name])}")


class FacesRequest(BaseModel):
    """A picture, and which of its faces are meant. Names and defaults are those of the nodes."""

    image: str = Field(..., description="the picture, base64, with or without a data: prefix")
    detector: str = _one_of("detector")
    confidence: float = Field(
        DEFAULT.confidence, ge=0.05, le=0.999, description="how sure the detector must be"
    )
    select: str = _one_of("select")
    order: str = _one_of("order")
    indices: str = Field(
        DEFAULT.indices, description='numbers of the faces for "by index", such as 0,2-4'
    )
    max_faces: int = Field(DEFAULT.max_faces, ge=0, le=1000, description="0 is no limit")
    min_size: int = Field(
        DEFAULT.min_size, ge=0, le=16384, description="smaller faces stay as they are, in pixels"
    )
    max_size: int = Field(
        DEFAULT.max_size, ge=0, le=16384, description="larger faces stay as they are; 0: any"
    )
    any_angle: bool = Field(DEFAULT.any_angle, description="also faces that lie; slow")


class RestoreRequest(FacesRequest):
    """A picture, which of its faces are restored, and how."""

    crop_size: int = Field(DEFAULT.crop_size, ge=512, le=1024, description="side of the crops")
    strength: float = Field(
        DEFAULT.strength, ge=0, le=1, description="how much of the restored face shows"
    )
    mask_type: str = _one_of("mask_type")
    feather: float = Field(
        DEFAULT.feather, ge=0, le=0.5, description="soft edge, as a fraction of the crop's side"
    )
    color_match: str = _one_of("color_match")
    keep_detail: float = Field(
        DEFAULT.keep_detail, ge=0, le=1, description="how much of the picture's finer detail stays"
    )
    keep: Optional[str] = Field(  # noqa: UP045
        None, description="a picture that is white where pixels must stay, base64"
    )
    aligned: bool = Field(
        False, description="the picture is a face crop already: all of it is restored"
    )


class FoundFace(BaseModel):
    """One face of a picture."""

    number: int = Field(..., description="for `indices`")
    box: list[float] = Field(..., description="left, top, right, bottom, in pixels")
    size: float = Field(..., description="shorter side of the box, in pixels")
    confidence: float = Field(..., description="how sure the detector is, 0 to 1")
    verdict: str = Field(..., description='"chosen", or why not')
    note: Optional[str] = Field(None, description="what went wrong, if anything")  # noqa: UP045


class FacesResponse(BaseModel):
    """The faces of a picture."""

    faces: list[FoundFace]
    report: str = Field(..., description="the same in words")
    preview: str = Field(..., description="the picture with the faces drawn, PNG, base64")


class RestoreResponse(BaseModel):
    """The restored picture."""

    image: str = Field(..., description="its size and mode, 8 bits; PNG, base64")
    mask: str = Field(..., description="how much of each pixel was replaced, PNG, base64")
    faces: list[FoundFace]
    report: str = Field(..., description="what was found, chosen and restored")
    model: str = Field(..., description="the networks that did it; empty where no face was")


def add_routes(_: Any, app: FastAPI) -> None:
    """Adds the routes where the host has its own API; for on_app_started."""
    if not (host.argument("api", False) or host.argument("nowebui", False)):
        return
    given: dict[str, Any] = {"methods": ["POST"], "tags": [host.NAME]}
    if host.argument("api_auth"):
        given["dependencies"] = [Depends(authenticate)]
    app.add_api_route("/osdface/v1/restore", restore, response_model=RestoreResponse, **given)
    app.add_api_route("/osdface/v1/faces", faces, response_model=FacesResponse, **given)


def authenticate(credentials: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008
    """Raises 401 unless name and password are among those of --api-auth."""
    for pair in host.argument("api_auth", "").split(","):
        name, _, password = pair.partition(":")
        if secrets.compare_digest(
            credentials.username.encode(), name.encode()
        ) and secrets.compare_digest(credentials.password.encode(), password.encode()):
            return
    raise HTTPException(
        401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"}
    )


def restore(request: RestoreRequest) -> RestoreResponse:
    """Restores the faces of a picture. Mode, size and transparency stay."""
    values = _values(request)
    image, keep = _picture(request.image), request.keep and _picture(request.keep)
    result = _do(lambda: restore_picture(image, options_of(values), keep or None, request.aligned))
    return RestoreResponse(
        image=_png(result.image),
        mask=_png(result.mask),
        faces=[FoundFace(**face) for face in result.faces],
        report=result.report,
        model=result.source,
    )


def faces(request: FacesRequest) -> FacesResponse:
    """Finds and numbers the faces of a picture, and tells which are chosen."""
    values = _values(request)
    image = _picture(request.image)
    found = _do(lambda: look(image, options_of(values)))
    return FacesResponse(
        faces=[FoundFace(**face) for face in found.faces],
        report=found.report,
        preview=_png(found.image),
    )


def _values(request: BaseModel) -> dict[str, Any]:
    return {name: getattr(request, name, None) for name in NAMES}


def _do(work: Any) -> Any:
    """The work in the host's queue, with what users can mend as status 422."""
    try:
        with host.own_job():
            return work()
    except OSDFaceError as error:
        raise HTTPException(422, str(error)) from error
    except host.Stopped as error:
        raise HTTPException(409, "stopped by the user") from error


def _picture(encoded: str) -> Image.Image:
    """A picture in base64, upright and of its own mode, or at an address, by the host's rules."""
    if encoded.startswith(("http://", "https://")):
        fetched: Image.Image = decode_base64_to_image(encoded)
        return fetched
    try:
        data = base64.b64decode(encoded.rpartition(",")[2])
        image: Image.Image = Image.open(io.BytesIO(data))
        image = ImageOps.exif_transpose(image)
    except (ValueError, binascii.Error, OSError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"`image` is no picture in base64 ({error}).") from error
    return image


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
