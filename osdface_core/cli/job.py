"""The work of a run, file by file, in this process or shared among workers by Ray."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import torch
from tqdm import tqdm

from ..errors import OSDFaceError
from . import animations, enhancer, pictures
from .aligned import Aligned
from .animations import Animation
from .enhancer import Enhancer
from .restorer import Restorer
from .upscaler import Upscaler

log = logging.getLogger(__name__)

VIDEOS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".m2ts",
    ".m2t",
    ".vob",
    ".mod",
    ".tod",
    ".wmv",
    ".asf",
    ".flv",
    ".f4v",
    ".3gp",
    ".3g2",
    ".ogv",
    ".ogm",
    ".mxf",
    ".dv",
    ".divx",
)
# What a command works with.
Networks = Restorer | Upscaler | Enhancer

EXISTS = "its output is there already"
DONE, SKIPPED, FAILED = "done", "skipped", "failed"


@dataclass(frozen=True)
class Item:
    """One file and the place of its restored copy.

    source: the file.
    target: the place.
    reason: why the file is not done; empty for a file to be done.
    wrong: whether that is a failure.
    """

    source: Path
    target: Path
    reason: str = ""
    wrong: bool = False


# Planning


def plan(source: Path, out: str, overwrite: bool, inputs: tuple[Path, ...] = ()) -> list[Item]:
    """The files of `source`, a file or a folder, and their places in `out`.

    `out` is a folder if it ends in a slash or is one. inputs: further files that must not be
    overwritten. Raises OSDFaceError if there is nothing to read, if the whole run would overwrite
    what it reads, or if a single output has another kind of extension than its input.
    """
    target = Path(out)
    if not source.exists():
        raise OSDFaceError(
            f"IN is {source}, which does not exist: name a picture, a folder or a video."
        )
    if source.is_dir():
        if target.exists() and (not target.is_dir() or target.samefile(source)):
            raise OSDFaceError(
                f"OUT is {target}, which is {'IN itself' if target.is_dir() else 'a file'}: name "
                "another folder."
            )
        sources = list(_files(source, target))
        pairs = [(path, target / path.relative_to(source)) for path in sources]
    else:
        into_folder = target.is_dir() or out.endswith(("/", os.sep))
        sources = [source]
        pairs = [(source, target / source.name if into_folder else target)]
    protected = {
        (s.st_dev, s.st_ino)
        for s in (path.stat() for path in (*sources, *inputs) if path.is_file())
    }
    items = []
    single = not source.is_dir()
    for path, place in pairs:
        kind = path.suffix.lower()
        wanted = VIDEOS if kind in VIDEOS else pictures.WRITTEN
        if path.is_symlink() and not path.is_file():
            items.append(
                Item(
                    path,
                    place,
                    "a link to a folder, which is not followed"
                    if path.is_dir()
                    else "a link to nothing",
                )
            )
        elif kind not in (*pictures.EXTENSIONS, *VIDEOS) and not pictures.is_picture(path):
            items.append(
                Item(
                    path,
                    place,
                    f"{kind or 'no extension'} is not a kind of picture or video that is done",
                    single,
                )
            )
        elif place.suffix.lower() != kind and place.suffix.lower() not in wanted:
            says = (
                f"OUT is {place}, whose extension is none of {', '.join(wanted)}: name such a "
                "file, or a folder with a / at its end"
            )
            items.append(Item(path, place, says, True))
        elif place.exists() and (place.stat().st_dev, place.stat().st_ino) in protected:
            items.append(
                Item(
                    path,
                    place,
                    f"{place} is an input of this run, which is never written over: name another "
                    "output",
                    True,
                )
            )
        elif place.exists() and not overwrite:
            items.append(Item(path, place, EXISTS))
        else:
            items.append(Item(path, place))
    if single and items[0].wrong:
        raise OSDFaceError(f"{source}: {items[0].reason}.")
    if not items:
        raise OSDFaceError(
            f"IN is {source}, which holds no files: name a folder of pictures or videos."
        )
    return items


def _files(source: Path, target: Path) -> Iterator[Path]:
    """All files and links below `source` in order, without hidden ones and those below `target`."""
    inside = target.resolve()
    for folder, below, names in os.walk(source):
        below[:] = sorted(
            name
            for name in below
            if not name.startswith(".") and (Path(folder) / name).resolve() != inside
        )
        paths = [
            Path(folder) / name for name in sorted([*below, *names]) if not name.startswith(".")
        ]
        yield from (path for path in paths if path.is_file() or path.is_symlink())


# One file


def networks(options: argparse.Namespace) -> Networks:
    """What the command works with. Raises OSDFaceError for weights that do not fit."""
    if enhancer.does(options):
        return Enhancer(options)
    if options.command == "upscale":
        return Upscaler(options)
    return Aligned(options) if options.aligned else Restorer(options)


def work(item: Item, restorer: Networks) -> dict[str, Any]:
    """Does one file and returns its entry of the report.

    A file that cannot be done is named in the entry and leaves nothing behind.
    """
    started = time.perf_counter()
    entry: dict[str, Any] = {"input": str(item.source), "output": str(item.target), "status": DONE}
    try:
        if isinstance(restorer, Enhancer):
            restorer.begin(item.source)
        video = item.source.suffix.lower() in VIDEOS
        if video:
            entry |= _video(item, restorer)
        elif animation := animations.look(item.source):
            entry |= _animation(item, animation, restorer)
        else:
            entry |= _picture(item, restorer)
    except Exception as error:  # one bad file must not stop the others
        log.debug("%s", item.source, exc_info=True)
        says = " ".join(str(error).split()) or type(error).__name__
        entry |= {
            "status": FAILED,
            "error": says if isinstance(error, OSDFaceError) else f"{type(error).__name__}: {says}",
        }
    return entry | {"seconds": round(time.perf_counter() - started, 3)}


def _picture(item: Item, restorer: Networks) -> dict[str, Any]:
    given = pictures.read(item.source)
    kind = item.target.suffix.lower()
    same = kind == item.source.suffix.lower()
    if not same:
        pictures.check_target(given, item.target)
    after, mask, faces = restorer.picture(given.pixels)

    def fill(fresh: Path) -> None:
        if same and not bool((mask > 0).any()):
            shutil.copyfile(item.source, fresh)
        else:
            pictures.check_target(given, item.target)
            pictures.write(given, after, mask, fresh, kind, restorer.options.quality)

    pictures.replace_file(item.target, fill)
    height, width = after.shape[:2]
    return {"width": width, "height": height, "faces": faces}


def _animation(item: Item, animation: Animation, restorer: Networks) -> dict[str, Any]:
    kind = item.target.suffix.lower()
    quality = restorer.options.quality
    return _by_frames(
        item,
        lambda fresh, progress: animations.restore(
            animation, fresh, kind, restorer, quality, progress
        ),
    )


def _video(item: Item, restorer: Networks) -> dict[str, Any]:
    from . import video

    crf = restorer.options.crf
    return _by_frames(
        item,
        lambda fresh, progress: (
            video.restore(item.source, fresh, restorer, crf, progress)
            if isinstance(restorer, Restorer)
            else video.upscale(item.source, fresh, restorer, crf, progress)
        ),
    )


def _by_frames(
    item: Item, do: Callable[[Path, Callable[[int, int], None]], dict[str, Any]]
) -> dict[str, Any]:
    """Makes an output by `do`, which counts the frames' steps, and returns what that says."""
    says: dict[str, Any] = {}
    # A frame takes two steps. leave=None keeps the bar where it is the only one, disable=None shows
    # none where standard error is no terminal.
    with tqdm(
        unit="frame", unit_scale=0.5, desc=item.source.name, leave=None, disable=None
    ) as steps:

        def progress(done: int, total: int) -> None:
            steps.total = total or None
            steps.update(done)

        try:
            pictures.replace_file(item.target, lambda fresh: says.update(do(fresh, progress)))
        except av.FFmpegError as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES):
                raise
            raise OSDFaceError(
                f"{item.source} cannot be done as a video ({error.strerror}): it is damaged or of "
                "another kind."
            ) from error
    return says


# All files


def run(items: list[Item], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Does the items, one after the other or by workers, and gives each one's entry of the report.

    Raises OSDFaceError for weights that do not fit, before anything is done. options: as
    restorer.resolve gives them.
    """
    if options.workers > 1 or options.ray_address:
        yield from _run_workers(items, options)
        return
    restorer = networks(options)
    for item in items:
        yield work(item, restorer)


class Worker:
    """One of several processes, kept by Ray: reads the networks once, then does file after file."""

    def __init__(self, options: argparse.Namespace, threads: int) -> None:
        torch.set_num_threads(threads)
        self.restorer = networks(options)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        item = Item(Path(row["source"]), Path(row["target"]))
        return {"entry": json.dumps(work(item, self.restorer))}


def _run_workers(items: list[Item], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise OSDFaceError(
            'Workers need Ray: run pip install "ray[data]", or leave --workers and --ray-address '
            "out."
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    package = str(Path(__file__).resolve().parents[2])
    environment = {
        "env_vars": {
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        }
    }
    try:
        ray.init(
            address=options.ray_address,
            ignore_reinit_error=True,
            include_dashboard=None if options.ray_address else False,
            configure_logging=False,
            log_to_driver=False,
            runtime_env=environment,
        )
    except ConnectionError as error:
        raise OSDFaceError(
            f"--ray-address is {options.ray_address}, where no Ray cluster answers: start one, or "
            "leave it out."
        ) from error
    left = {str(item.source.absolute()): item for item in items}
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        # Devices that Ray counts as GPUs; for another kind it would wait forever.
        accelerator = torch.device(options.device).type in ("cuda", "xpu")
        threads = max(1, (os.cpu_count() or 1) // options.workers)
        rows = [
            {"source": str(item.source.absolute()), "target": str(item.target.absolute())}
            for item in items
        ]
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Worker,  # type: ignore[arg-type]
            fn_constructor_args=(options, threads),
            compute=ray.data.ActorPoolStrategy(size=options.workers),
            num_gpus=1 if accelerator else None,
            num_cpus=None if accelerator else 1,
        )
        for row in done.iter_rows():
            entry = json.loads(row["entry"])
            del left[entry["input"]]
            yield entry
    except ray.exceptions.RayError as error:
        # Ray's message is a whole trace with the worker's own sentence at its end.
        _, name, said = str(error).rpartition(f"{OSDFaceError.__name__}: ")
        says = (
            said.partition("\n")[0] if name else "The workers stopped: " + said.partition("\n")[0]
        )
        if len(left) == len(items):
            raise OSDFaceError(says) from error
        for item in left.values():
            yield {
                "input": str(item.source),
                "output": str(item.target),
                "status": FAILED,
                "error": says,
            }
    finally:
        ray.shutdown()
