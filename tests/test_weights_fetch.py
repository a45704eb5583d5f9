"""Downloads against a real server that misbehaves: after each, either the right file is there or
none.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file

from osdface_core.errors import OSDFaceError
from osdface_core.weights import fetching
from osdface_core.weights.catalogue import WeightFile
from osdface_core.weights.fetching import UnreachableError, fetch, recorded_sha256, sha256_of
from osdface_core.weights.store import State, judge
from tests.weight_server import (
    PROXIES,
    Answer,
    Server,
    cut,
    other,
    running,
    stall,
    status,
    web_page,
)

CONTENT = random.Random(0).randbytes(1_000_000)
NAME = "detector.pth"
RELEASE = "https://github.com/"
FIRST, SECOND = "first/weights.pth", "second/weights.pth"
REPOSITORY = "somebody/faces"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from huggingface_hub import constants, file_download

    for variable in PROXIES:
        monkeypatch.delenv(variable, raising=False)
    with running() as state:
        monkeypatch.setenv("HF_ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
        # Older versions import it by name.
        for module in (constants, file_download):
            monkeypatch.setattr(module, "DOWNLOAD_CHUNK_SIZE", 2**14, raising=False)
        monkeypatch.setenv("OSDFACE_RELEASES", state.url)
        yield state


def entry(tmp_path: Path, *addresses: str, known: bool = True) -> WeightFile:
    content = tmp_path / "content"
    content.write_bytes(CONTENT)
    return WeightFile(
        NAME,
        "a test",
        "facedetection",
        "none",
        "the moon",
        {},
        addresses or (RELEASE + FIRST, RELEASE + SECOND),
        size=len(CONTENT) if known else None,
        sha256=sha256_of(content) if known else None,
    )


def there(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def is_right(folder: Path) -> bool:
    return (folder / NAME).read_bytes() == CONTENT and there(folder) == [NAME, NAME + ".sha256"]


def test_a_release_file_arrives_with_its_digest_beside_it_and_is_not_fetched_again(
    server: Server, tmp_path: Path
) -> None:
    server.release(FIRST, CONTENT)
    wanted, seen = entry(tmp_path), []
    path = fetch(wanted, tmp_path / "models", lambda done, total: seen.append((done, total)))
    assert is_right(tmp_path / "models")
    assert recorded_sha256(path) == wanted.sha256
    assert seen and all(0 <= done <= total == len(CONTENT) for done, total in seen)
    fetch(wanted, tmp_path / "models")
    assert len(server.gets) == 1


def test_a_cut_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.answers[server.release(FIRST, CONTENT)] = [cut]
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")
    (_, whole), (_, rest) = server.gets
    assert whole is None and rest is not None and 0.3 < int(rest[6:-1]) / len(CONTENT) <= 0.4


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (other, "SHA-256"),
        (web_page, "web page"),
        (status(404), "404"),
        (status(403), "403"),
        (status(500), "nothing came|500"),
        (status(429, Retry_After="3600"), "nothing came|429"),
    ],
)
def test_an_address_that_fails_leaves_nothing_and_the_next_is_tried(
    answer: Answer,
    reason: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "LONGEST_SILENCE", 2.0)
    server.answers[server.release(FIRST, CONTENT)] = [answer] * 20
    with pytest.raises(UnreachableError, match=reason) as raised:
        fetch(entry(tmp_path, RELEASE + FIRST), tmp_path / "models")
    assert "the moon" in str(raised.value) and "\n" not in str(raised.value)
    assert there(tmp_path / "models") == [] and not list((tmp_path / "models").rglob("*.part"))
    server.release(SECOND, CONTENT)
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")


@pytest.mark.parametrize("answer", [status(429, Retry_After="0"), status(500), stall])
def test_a_server_in_trouble_is_asked_again(answer: Answer, server: Server, tmp_path: Path) -> None:
    server.answers[server.release(FIRST, CONTENT)] = [answer]
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")
    assert [path for path, _ in server.gets] == ["/" + FIRST] * 2


def test_a_redirect_is_followed(server: Server, tmp_path: Path) -> None:
    moved = server.release("elsewhere/file", CONTENT)
    server.answers["/" + FIRST] = [status(302, Location=moved)]
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")


def test_a_server_that_ignores_the_range_gives_the_right_file(
    server: Server, tmp_path: Path
) -> None:
    def whole(request, content):
        del request.headers["Range"]
        serve_whole(request, content)

    from tests.weight_server import serve as serve_whole

    server.answers[server.release(FIRST, CONTENT)] = [cut, whole]
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")


def test_a_wrong_first_half_does_not_spoil_the_file(server: Server, tmp_path: Path) -> None:
    server.release(FIRST, CONTENT)
    wanted = entry(tmp_path)
    part = tmp_path / "models" / fetching.INCOMPLETE / f"{NAME}.{wanted.sha256[:12]}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT[::-1][:1000])
    fetch(wanted, tmp_path / "models")
    assert is_right(tmp_path / "models") and not part.exists()


def test_a_damaged_file_of_the_same_name_is_replaced(server: Server, tmp_path: Path) -> None:
    server.release(FIRST, CONTENT)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / NAME).write_bytes(CONTENT[:1000])
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")


def test_what_the_hub_says_is_recorded_and_holds_from_then_on(
    server: Server, tmp_path: Path
) -> None:
    path = server.hub(REPOSITORY, "w.pth", CONTENT)
    wanted = entry(tmp_path, f"hub:{REPOSITORY}/w.pth", known=False)
    server.answers[path] = [other] * 5
    with pytest.raises(UnreachableError, match="SHA-256"):
        fetch(wanted, tmp_path / "models")
    assert there(tmp_path / "models") == []
    server.answers.clear()
    placed = fetch(wanted, tmp_path / "models")
    assert is_right(tmp_path / "models")
    placed.unlink()
    server.files[path] = CONTENT[::-1]
    with pytest.raises(UnreachableError, match="another file under this name"):
        fetch(wanted, tmp_path / "models")
    assert not placed.exists()


def tensors(path: Path, **shapes: tuple[int, ...]) -> bytes:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    return path.read_bytes()


@pytest.mark.parametrize("etag", ['W/"5f2a-1"', "x" * 64, "0" * 32, "true"])
@pytest.mark.parametrize("given", ["rubbish", "other shapes", "cut off"])
def test_a_mirror_s_rubbish_is_refused_whatever_it_says_of_it(
    etag: str, given: str, server: Server, tmp_path: Path
) -> None:
    """A digest that it states proves that the rubbish came whole."""
    whole = tensors(tmp_path / "whole.safetensors", weight=(64, 40))
    content = {
        "rubbish": CONTENT[:22_000],
        "other shapes": tensors(tmp_path / "other.safetensors", weight=(40, 64)),
        "cut off": whole[:-100],
    }[given]
    wanted = replace(
        entry(tmp_path, f"hub:{REPOSITORY}/w.pth", known=False), signature={"weight": (64, 40)}
    )
    path = server.hub(REPOSITORY, "w.pth", content)
    if etag != "true":
        server.etags[path] = etag
    with pytest.raises(UnreachableError, match="gave another file"):
        fetch(wanted, tmp_path / "models")
    assert there(tmp_path / "models") == []
    assert list((tmp_path / "models" / fetching.INCOMPLETE).glob("*.part")) == []


def test_a_digest_that_nobody_states_is_recorded_on_the_user_s_word_alone(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = tensors(tmp_path / "whole.safetensors", weight=(64, 40))
    wanted = replace(
        entry(tmp_path, f"hub:{REPOSITORY}/w.pth", known=False), signature={"weight": (64, 40)}
    )
    path = server.hub(REPOSITORY, "w.pth", content)
    server.etags[path] = 'W/"5f2a-1"'
    placed = fetch(wanted, tmp_path / "models")
    assert placed.read_bytes() == content
    assert there(tmp_path / "models") == [NAME], "an unknown digest was recorded"
    assert "no SHA-256 is known" in caplog.text
    found = judge(wanted, placed)
    assert (found.state, "no SHA-256 is known" in found.why) == (State.ACCEPTED, True)
    fetch(wanted, tmp_path / "models")
    assert len(server.gets) == 1, "it was fetched again"
    placed.unlink()
    placed = fetch(wanted, tmp_path / "models", trust=True)
    assert recorded_sha256(placed) == sha256_of(placed)
    found = judge(wanted, placed)
    assert (found.state, "recorded" in found.why) == (State.VERIFIED, True)
    # From then on it holds.
    placed.unlink()
    server.files[path] = tensors(tmp_path / "later.safetensors", weight=(64, 40), more=(1,))
    with pytest.raises(UnreachableError, match="SHA-256"):
        fetch(wanted, tmp_path / "models")


def test_rubbish_that_was_once_recorded_is_told_and_replaced(
    server: Server, tmp_path: Path
) -> None:
    content = tensors(tmp_path / "whole.safetensors", weight=(64, 40))
    wanted = replace(
        entry(tmp_path, f"hub:{REPOSITORY}/w.pth", known=False), signature={"weight": (64, 40)}
    )
    server.hub(REPOSITORY, "w.pth", content)
    folder = tmp_path / "models"
    folder.mkdir()
    rubbish = folder / NAME
    tensors(rubbish, weight=(2, 2))
    record = rubbish.with_name(NAME + fetching.RECORD)
    record.write_text(f"{sha256_of(rubbish)}  {NAME}\n")
    assert judge(wanted, rubbish).state == State.WRONG
    assert fetch(wanted, folder).read_bytes() == content
    # A record without its file cannot be judged: the sentence says what to do.
    record.write_text(f"{'0' * 64}  {NAME}\n")
    rubbish.unlink()
    with pytest.raises(UnreachableError, match=f"delete {NAME}.sha256"):
        fetch(wanted, folder)


def test_the_hub_s_storage_on_another_server_is_followed_and_resumed(
    server: Server, tmp_path: Path
) -> None:
    with running() as storage:
        path = server.hub(REPOSITORY, "w.pth", CONTENT)
        server.moved[path] = storage.url + storage.release("bucket/object", CONTENT)
        storage.answers["/bucket/object"] = [cut]
        fetch(entry(tmp_path, f"hub:{REPOSITORY}/w.pth", known=False), tmp_path / "models")
        assert is_right(tmp_path / "models")
        assert [bool(wanted) for _, wanted in storage.gets] == [False, True]


def test_stopping_keeps_what_came_for_the_next_run(server: Server, tmp_path: Path) -> None:
    server.answers[server.release(FIRST, CONTENT)] = [stall]

    def stop(done: int, total: int) -> None:
        if done > 0.3 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(entry(tmp_path), tmp_path / "models", stop)
    assert there(tmp_path / "models") == []
    fetch(entry(tmp_path), tmp_path / "models")
    assert is_right(tmp_path / "models")
    assert server.gets[-1][1] is not None, (
        "the second run did not go on from where the first stopped"
    )


def test_the_host_s_own_interruption_passes_through(server: Server, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Interrupted

    server.answers[server.release(FIRST, CONTENT)] = [stall]
    with pytest.raises(Interrupted):
        fetch(entry(tmp_path), tmp_path / "models", stop)
    assert there(tmp_path / "models") == []


def test_a_second_process_waits_and_takes_what_the_first_fetched(
    server: Server, tmp_path: Path
) -> None:
    server.release(FIRST, CONTENT)
    models = tmp_path / "models"
    (models / fetching.INCOMPLETE).mkdir(parents=True)
    first = FileLock(models / fetching.INCOMPLETE / (NAME + ".lock"))
    first.acquire()

    def finish_the_first(done: int, total: int) -> None:
        if first.is_locked:
            (models / NAME).write_bytes(CONTENT)
            first.release()

    assert fetch(entry(tmp_path), models, finish_the_first).read_bytes() == CONTENT
    assert server.gets == []


def test_a_dead_host_is_asked_once(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OSDFACE_RELEASES", "http://127.0.0.1:9")
    unreachable: set[str] = set()
    with pytest.raises(UnreachableError) as raised:
        fetch(entry(tmp_path), tmp_path / "models", unreachable=unreachable)
    assert unreachable == {"127.0.0.1:9"}
    assert "not reached before" in raised.value.why[1]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounted = []

    def make(options: str) -> Path:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a tmpfs"
)
def test_a_full_disk_is_told_before_and_during_the_download(
    server: Server, tmp_path: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = mount("size=512k")
    server.release(FIRST, CONTENT)
    with pytest.raises(OSDFaceError, match="MB free"):
        fetch(entry(tmp_path), folder)
    assert server.gets == []
    monkeypatch.setattr(fetching, "SPARE_DISK", -(2**40))
    with pytest.raises(OSDFaceError, match="is full"):
        fetch(entry(tmp_path), folder)
    assert there(folder) == [] and not list(folder.rglob("*.part"))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root mounts a tmpfs"
)
def test_a_read_only_folder_is_told(
    server: Server, tmp_path: Path, mount: Callable[[str], Path]
) -> None:
    folder = mount("size=8m,ro")
    server.release(FIRST, CONTENT)
    with pytest.raises(OSDFaceError, match="cannot be written to"):
        fetch(entry(tmp_path), folder)
    assert server.gets == []
