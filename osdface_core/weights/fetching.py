"""Downloads a file of the catalogue into its folder, whole and verified.

If that fails, the folder stays as it was. huggingface_hub, which every host has with transformers,
does the transfers, from the hub and, by the same function, from release pages. It retries, resumes,
waits as Retry-After says, and respects HF_ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT and the proxies'
variables.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from ..errors import OSDFaceError
from .catalogue import HUB, RELEASES, WeightFile
from .signature import fits, shapes

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

log = logging.getLogger(__name__)

# Called with the bytes there and the bytes in all; what it raises stops the download.
Progress = Callable[[int, int], None]

INCOMPLETE = ".incomplete"
RECORD = ".sha256"
SPARE_DISK = 64 * 2**20
TRIES = 3
TRY_AGAIN = (408, 425, 429, 500, 502, 503, 504)
MOST_BREAKS = 100
LONGEST_WAIT = 60.0
# huggingface_hub waits as long as a server asks it to, which may be an hour.
LONGEST_SILENCE = 120.0
POLL = 0.2
WEB_PAGE = "a web page instead of the file"
_METADATA_TIMEOUT = 10.0
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_CHUNK = 2**20


class UnreachableError(OSDFaceError):
    """No address gave the file. why: a line for each address tried."""

    def __init__(self, message: str, why: list[str]) -> None:
        super().__init__(message)
        self.why = why


class _NextAddress(Exception):
    """This address does not give the file; the message says why."""


class _NotReached(_NextAddress):
    """The server did not answer and is not asked again."""


class _Failed(Exception):
    """An error of huggingface_hub, as opposed to one that `progress` raises."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _Stopped(Exception):
    """Ends the thread that transfers."""


_T = TypeVar("_T")


@dataclass(frozen=True)
class _Source:
    url: str
    size: int | None
    sha256: str | None


def sha256_of(path: Path) -> str:
    """SHA-256 of the file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def recorded_sha256(path: Path) -> str | None:
    """The digest recorded beside the file when it was placed, as sha256sum writes it; else None."""
    record = path.with_name(path.name + RECORD)
    if not record.is_file():
        return None
    digest = record.read_text(encoding="utf-8").split(maxsplit=1)[:1]
    return (
        digest[0].lower() if digest and len(digest[0]) == hashlib.sha256().digest_size * 2 else None
    )


def record_sha256(path: Path, digest: str) -> None:
    """Writes the digest beside the file, in the format of sha256sum."""
    record = path.with_name(path.name + RECORD)
    fresh = record.with_name(record.name + ".part")
    fresh.write_text(f"{digest}  {path.name}\n", encoding="utf-8")
    fresh.replace(record)


def _record(path: Path, digest: str | None) -> None:
    """Records the digest of what is about to be placed; for None, removes that of another file."""
    if digest is None:
        path.with_name(path.name + RECORD).unlink(missing_ok=True)
    else:
        record_sha256(path, digest)


def write_whole(path: Path, write: Callable[[Path], str | None]) -> Path:
    """Makes the file `path`, whole or not at all, and records its digest beside it.

    write: fills the temporary file it is given and returns the content's SHA-256, or None where it
    is not to be recorded as known. Raises OSDFaceError for a full or read-only disk.
    """
    from filelock import FileLock

    try:
        incomplete = path.parent / INCOMPLETE
        incomplete.mkdir(parents=True, exist_ok=True)
        with FileLock(incomplete / (path.name + ".lock")):
            fresh = incomplete / (path.name + ".part")
            try:
                digest = write(fresh)
                _record(path, digest)
                fresh.replace(path)
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(path, error) from error
    return path


def disk_error(path: Path, error: OSError) -> OSDFaceError:
    """The error for a disk that does not take a file."""
    if error.errno in _DISK_FULL:
        return OSDFaceError(
            f"The disk of {path.parent} is full: {path.name} was not written; make room and run "
            "this again."
        )
    if error.errno in _NOT_WRITABLE:
        return OSDFaceError(
            f"{path.parent} cannot be written to: {path.name} was not written; allow it, or name "
            "another models folder."
        )
    return OSDFaceError(f"{path} cannot be written ({error.strerror or error}).")


def fetch(
    entry: WeightFile,
    folder: Path,
    progress: Progress | None = None,
    unreachable: set[str] | None = None,
    trust: bool = False,
) -> Path:
    """Downloads `entry` into `folder` unless it is there, and returns its path.

    The content is checked against the catalogue's SHA-256, else the one recorded here before, else
    the hub's. Where the catalogue has none, the names and shapes of its tensors must be right too;
    and where nobody states one, none is recorded, unless `trust` is the user's word for it. A
    broken download is resumed, in this run or the next. Of two processes the second
    waits for the first. progress: called several times a second, in the caller's thread.
    unreachable: hosts that did not answer; they are skipped, and further ones are added. Raises
    UnreachableError when no address gives the file, another OSDFaceError for what is wrong on this
    machine.
    """
    from filelock import FileLock, Timeout

    path = folder / entry.name
    unreachable = set() if unreachable is None else unreachable
    try:
        incomplete = folder / INCOMPLETE
        incomplete.mkdir(parents=True, exist_ok=True)
        lock = FileLock(incomplete / (entry.name + ".lock"))
        waiting = False
        while True:
            try:
                lock.acquire(timeout=POLL)
                break
            except Timeout:
                if not waiting:
                    log.info("%s is being fetched by another process: waiting for it", entry.name)
                waiting = True
                if progress:
                    progress(0, entry.expected_size)
        try:
            known = entry.sha256 or recorded_sha256(path)
            if path.is_file() and (
                waiting
                or (
                    (sha256_of(path) == known if known else bool(entry.signature))
                    and _misfit(entry, path) is None
                )
            ):
                return path
            if path.is_file() and _misfit(entry, path) is not None:
                # What was recorded of another file is no truth.
                _record(path, None)
            return _fetch(entry, path, incomplete, progress, unreachable, trust)
        finally:
            lock.release()
    except OSError as error:
        raise disk_error(path, error) from error


def _fetch(
    entry: WeightFile,
    path: Path,
    incomplete: Path,
    progress: Progress | None,
    unreachable: set[str],
    trust: bool,
) -> Path:
    why = []
    for address in entry.addresses:
        host = urlsplit(_release(address)).netloc if not address.startswith(HUB) else HUB
        if host in unreachable:
            why.append(f"{address}: the server was not reached before")
            continue
        part = incomplete / f"{entry.name}.part"
        try:
            source = _source(address, entry, path, progress)
            part = incomplete / f"{entry.name}.{(source.sha256 or 'unknown')[:12]}.part"
            _check_space(
                path,
                (source.size or entry.expected_size)
                - (part.stat().st_size if part.is_file() else 0),
            )
            digest: str | None = _transfer(entry, source, part, progress)
            if (misfit := _misfit(entry, part)) is not None:
                part.unlink()
                raise _NextAddress(f"gave another file: {misfit}")
            if source.sha256 is None and not trust:
                log.warning(
                    "%s: no SHA-256 is known for it; the names and shapes of the tensors that "
                    "tell it are right",
                    entry.name,
                )
                digest = None
        except _NextAddress as error:
            if isinstance(error, _NotReached):
                unreachable.add(host)
            log.info("%s: %s", address, error)
            why.append(f"{address}: {error}")
            continue
        finally:
            # A transfer that was given up may still hold its file open: Windows then refuses to
            # delete it.
            with suppress(FileNotFoundError, PermissionError):
                if not part.stat().st_size:
                    part.unlink()
        _record(path, digest)
        part.replace(path)
        for left in incomplete.glob(f"{entry.name}.*.part"):
            left.unlink(missing_ok=True)
        return path
    by_hand = f"download it by hand from {entry.by_hand} and put it into {path.parent}"
    raise UnreachableError(f"{entry.name} could not be fetched ({'; '.join(why)}): {by_hand}.", why)


def _misfit(entry: WeightFile, path: Path) -> str | None:
    """Why `path` is not the file by the names and shapes of its tensors; None if it may be.

    A file whose digest the catalogue has is told by that.
    """
    if entry.sha256 is not None or not entry.signature:
        return None
    try:
        right = fits(entry, shapes(path))
    except OSDFaceError as error:
        return str(error).rstrip(".")
    return None if right else f"it does not hold the tensors of {entry.name}"


def _release(address: str) -> str:
    """The address, on the mirror that OSDFACE_RELEASES names instead of https://github.com."""
    mirror = os.environ.get("OSDFACE_RELEASES")
    return (
        mirror.rstrip("/") + "/" + address.removeprefix(RELEASES)
        if mirror and address.startswith(RELEASES)
        else address
    )


def _source(address: str, entry: WeightFile, path: Path, progress: Progress | None) -> _Source:
    """Where the bytes are, and their size and digest."""
    known = entry.sha256 or recorded_sha256(path)
    if not address.startswith(HUB):
        return _Source(_release(address), entry.size, known)
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
    except ImportError as error:
        raise _NextAddress(
            "huggingface_hub is not installed: run this with the Python of ComfyUI"
        ) from error
    owner, repository, file = address.removeprefix(HUB).split("/", 2)
    url = hf_hub_url(f"{owner}/{repository}", file, endpoint=os.environ.get("HF_ENDPOINT") or None)

    def ask() -> HfFileMetadata:
        try:
            return get_hf_file_metadata(url, token=False, timeout=_METADATA_TIMEOUT)
        except Exception as error:
            raise _Failed(error) from error

    metadata = _retry(ask, entry, progress)
    # A mirror's may be anything.
    told = metadata.etag if re.fullmatch("[0-9a-f]{64}", metadata.etag or "") else None
    if known and told and known != told:
        remedy = "" if entry.sha256 else f": delete {path.name}{RECORD} to trust the hub's"
        raise _NextAddress(f"the hub has another file under this name than the one known{remedy}")
    return _Source(metadata.location or url, metadata.size, known or told)


def _check_space(path: Path, wanted: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if wanted + SPARE_DISK > free:
        raise OSDFaceError(
            f"The disk of {path.parent} has {free / 1e6:,.0f} MB free and {path.name} wants "
            f"{(wanted + SPARE_DISK) / 1e6:,.0f} MB: "
            "make room, or name another models folder."
        )


class _Part(io.BufferedRandom):
    """The file under its temporary name, opened at its end; once stopped it refuses more bytes."""

    def __init__(self, path: Path) -> None:
        path.touch()
        super().__init__(io.FileIO(path, "r+"))
        self.seek(0, os.SEEK_END)
        self.there = self.tell()
        self.stopped = threading.Event()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.stopped.is_set():
            raise _Stopped
        written = super().write(data)
        self.there += written
        return written

    def truncate(self, size: int | None = None) -> int:
        self.there = super().truncate(size)
        return self.there


def _transfer(entry: WeightFile, source: _Source, part: Path, progress: Progress | None) -> str:
    """Fills `part` from where it stands and returns its SHA-256.

    A part that is not the wanted file is removed.
    """
    resumed = part.is_file() and part.stat().st_size > 0
    if source.sha256 is None or (
        resumed and source.size is not None and part.stat().st_size > source.size
    ):
        part.unlink(missing_ok=True)
        resumed = False
    _retry(lambda: _get_resuming(entry, source, part, progress), entry, progress)
    digest = sha256_of(part)
    if source.sha256 is not None and digest != source.sha256:
        what = _describe_part(part)
        part.unlink()
        if resumed:  # what was there before may have been the wrong half
            return _transfer(entry, source, part, progress)
        raise _NextAddress(f"gave {what}: its SHA-256 is not the known one")
    if source.size is not None and part.stat().st_size != source.size:
        what = _describe_part(part)
        part.unlink()
        raise _NextAddress(f"gave {what} of another size")
    return digest


def _describe_part(part: Path) -> str:
    with part.open("rb") as file:
        return WEB_PAGE if file.read(256).lstrip().startswith(b"<") else "another file"


def _get_resuming(
    entry: WeightFile, source: _Source, part: Path, progress: Progress | None
) -> None:
    """Transfers, and resumes after each break as long as more comes.

    Only newer versions of huggingface_hub do so themselves.
    """
    for _ in range(MOST_BREAKS):
        before = part.stat().st_size if part.is_file() else 0
        try:
            return _get(entry, source, part, progress)
        except _Failed as error:
            now = part.stat().st_size if part.is_file() else 0
            if (
                source.size is not None and now > source.size
            ):  # the whole file came after the first half
                part.unlink()
            elif now <= before or getattr(error.cause, "response", None) is not None:
                raise
    raise _NotReached(f"the connection broke {MOST_BREAKS} times")


def _get(entry: WeightFile, source: _Source, part: Path, progress: Progress | None) -> None:
    """One transfer, in its own thread, so that a stalled server does not keep the caller."""
    from huggingface_hub.file_download import http_get

    file = _Part(part)
    failure: list[Exception] = []

    def work() -> None:
        try:
            with file:
                http_get(
                    source.url,
                    file,
                    resume_size=file.there,
                    expected_size=source.size,
                    displayed_filename=entry.name,
                )
        except _Stopped:
            pass
        except Exception as error:  # told apart in _tried, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=work, name=f"fetch {entry.name}", daemon=True)
    thread.start()
    came, when = file.there, time.monotonic()
    try:
        while thread.is_alive():
            thread.join(POLL)
            if progress:
                progress(file.there, source.size or entry.expected_size)
            if file.there != came:
                came, when = file.there, time.monotonic()
            elif time.monotonic() - when > LONGEST_SILENCE:
                raise _NextAddress(f"nothing came for {LONGEST_SILENCE:.0f} s")
    except BaseException:
        file.stopped.set()
        thread.join(1.0)
        raise
    if failure:
        seen = _describe_part(part)
        if seen == WEB_PAGE or getattr(failure[0], "errno", None) in _DISK_FULL:
            part.unlink()
        if seen == WEB_PAGE:
            raise _NextAddress(f"gave {seen}") from failure[0]
        raise _Failed(failure[0])


def _retry(work: Callable[[], _T], entry: WeightFile, progress: Progress | None) -> _T:
    """The result of `work`, tried again while the server asks for patience.

    huggingface_hub has retried broken connections by then.
    """
    for attempt in range(1, TRIES + 1):
        try:
            return work()
        except _Failed as error:
            seconds = _wait(error.cause, attempt)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(POLL, left))
            if progress:
                progress(0, entry.expected_size)
    raise AssertionError("the last attempt returns or raises")


def _wait(error: Exception, attempt: int) -> float:
    """Seconds to wait before the next attempt; raises where there is to be none.

    huggingface_hub's exceptions differ from version to version. Told apart are: those with a
    response, those of the disk, its check of the size (a bare OSError), and the rest, in which no
    server answered.
    """
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, OSError) and error.errno in (*_DISK_FULL, *_NOT_WRITABLE):
        raise error
    if status is None or response is None:
        if type(error) is OSError:
            raise _NextAddress("gave a file of another size") from error
        raise _NotReached(
            f"the server was not reached, or broke off ({str(error) or type(error).__name__:.200})"
        ) from error
    asked = str(response.headers.get("Retry-After", ""))
    seconds = float(asked) if asked.isdigit() else float(attempt)
    if status not in TRY_AGAIN or attempt == TRIES or seconds > LONGEST_WAIT:
        raise _NextAddress(f"the server answered {status}") from error
    return seconds
