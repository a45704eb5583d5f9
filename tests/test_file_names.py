"""Files that a shared workflow names are found as its maker's system, or the authors' own
instructions, have put them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host

VRE, CHECKPOINT = "osdface_vre.safetensors", "associate_2.ckpt"
PROJECTORS = ("embedding_change_weights.pth", "embedding_change.pth")


@pytest.fixture
def models(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder of its own, for all kinds of files."""
    known = host.folder_paths.folder_names_and_paths
    for folder in ("osdface", "loras", "osediff", "diffir"):
        monkeypatch.setitem(known, folder, ([str(tmp_path / folder)], known[folder][1]))
    return tmp_path


def put(file: Path) -> Path:
    """An empty file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    return file


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("osdface", "osdface"),
        ("osdface", "loras"),
        ("loras", "loras"),
        ("osediff", "osediff"),
        ("diffir", "diffir"),
    ],
)
@pytest.mark.parametrize("name", ["shelf\\mine.safetensors", "shelf/mine.safetensors"])
def test_a_name_with_another_system_s_slashes_is_found(
    name: str, folder: str, kind: str, host: Any, models: Path
) -> None:
    file = put(models / folder / "shelf/mine.safetensors")
    assert host.files.find(name, kind).samefile(file)
    assert host.files.fingerprint_of(name, kind) == str(host.files.fingerprint(file))


@pytest.mark.parametrize(
    "node", ["OSDFaceVRE", "OSDFaceOneStep", "OSDFaceRestore", "OSEDiffUpscale"]
)
def test_the_host_leaves_names_of_files_to_the_nodes(node: str, host: Any) -> None:
    """It would refuse one that its menu writes another way before the node is asked."""
    kind = host.nodes[node]
    names = [item.id for item in kind.define_schema().inputs if item.id.endswith("_name")]
    assert names
    assert kind.validate_inputs(**{name: "shelf\\mine.safetensors" for name in names}) is True


@pytest.mark.parametrize(
    ("wanted", "below"),
    [(VRE, ""), (f"shelf\\{VRE}", "shelf"), (f"shelf/{VRE}", "shelf"), (f"shelf/{VRE}", "")],
)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_the_released_checkpoint_stands_for_the_converted_embedder(
    wanted: str, below: str, projector: str, host: Any, models: Path
) -> None:
    folder = models / "osdface" / below
    checkpoint = put(folder / CHECKPOINT)
    with pytest.raises(host.error, match=VRE):
        host.files.find(wanted, "osdface")
    put(folder / projector)
    assert host.files.find(wanted, "osdface").samefile(checkpoint)
    converted = put(models / "osdface" / wanted.replace("\\", "/"))
    assert host.files.find(wanted, "osdface").samefile(converted), "the converted one comes first"
