"""The command line: `python -m osdface_core restore IN OUT`, `upscale`, `deblur`, `inpaint`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import OSDFaceError

OK, SOME_FAILED, UNUSABLE, STOPPED = 0, 1, 2, 130
MASK = "a mask of this run"

log = logging.getLogger("osdface")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command and returns the exit code. argparse itself exits with 2 for wrong options."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        from .options import parser

        return run(parser().parse_args(arguments))
    except ModuleNotFoundError as error:
        log.error(
            'The Python package %s is missing: run pip install -e ".[cli]" in the project\'s '
            "folder.",
            error.name,
        )
        return UNUSABLE
    except OSDFaceError as error:
        log.error("%s", error)
        return UNUSABLE
    except OSError as error:
        if error.filename is None:
            raise
        log.error("%s cannot be used (%s): name another.", error.filename, error.strerror)
        return UNUSABLE
    except KeyboardInterrupt:
        log.error("\nStopped; start the same command again to go on from here.")
        return STOPPED


def run(options: argparse.Namespace) -> int:
    """Runs a command and returns the exit code.

    Raises OSDFaceError where nothing can be done, and KeyboardInterrupt.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ..faces.choose import CHOSEN
    from . import enhancer, job

    started = time.perf_counter()
    others = (options.keep, getattr(options, "mask", None))
    inputs = {path for path in others if path and path.exists()}
    masks = enhancer.masks_in(others[1]) if others[1] and others[1].is_dir() else set()
    items = [
        replace(item, reason=MASK, wrong=False) if item.source.resolve() in masks else item
        for item in job.plan(options.input, options.output, options.overwrite, (*inputs, *masks))
    ]
    entries = [_left_out(item) for item in items if item.reason]
    for item in items:
        if item.reason and item.reason not in (job.EXISTS, MASK):
            log.warning(
                "%s is %s: %s.", item.source, "not done" if item.wrong else "skipped", item.reason
            )
    todo = [item for item in items if not item.reason]
    if options.report:
        _check_report(options, items, masks)
        # Written now too: hours of work are not to end in a report that cannot be written.
        _write_report(options.report, options, entries, time.perf_counter() - started)
    settled, reported = options, True
    try:
        if todo:
            from . import restorer, upscaler

            if enhancer.does(options):
                settled = enhancer.resolve(options)
            else:
                command = upscaler if options.command == "upscale" else restorer
                settled = command.resolve(options)
            # A single video has its own bar, by frames.
            alone = len(todo) == 1 and todo[0].source.suffix.lower() in job.VIDEOS
            with (
                tqdm(total=len(todo), unit="file", disable=alone or None) as bar,
                logging_redirect_tqdm(),
            ):
                for entry in job.run(todo, settled):
                    entries.append(entry)
                    if "error" in entry:
                        log.error(
                            "%s",
                            entry["error"]
                            if entry["input"] in entry["error"]
                            else f"{entry['input']}: {entry['error']}",
                        )
                    bar.update()
    finally:
        if options.report:
            try:
                _write_report(options.report, settled, entries, time.perf_counter() - started)
            except OSDFaceError as error:
                log.error("%s", error)
                reported = False
    counts = Counter(entry["status"] for entry in entries)
    without = sum(
        not any(face["verdict"] == CHOSEN for face in entry.get("faces", ()))
        for entry in entries
        if entry["status"] == job.DONE
    )
    if without and (options.command == "restore" or options.faces):
        log.warning(
            "%d of the files done have no face that was found and chosen; --report tells which.",
            without,
        )
    sys.stdout.write(
        ", ".join(
            f"{counts[status]} {status}"
            for status in (job.DONE, job.SKIPPED, job.FAILED)
            if counts[status]
        )
        + "\n"
    )
    return SOME_FAILED if counts[job.FAILED] or not reported else OK


def _left_out(item: Any) -> dict[str, Any]:
    what = (
        {"status": "failed", "error": item.reason}
        if item.wrong
        else {"status": "skipped", "reason": item.reason}
    )
    return {"input": str(item.source), "output": str(item.target), **what}


def _check_report(options: argparse.Namespace, items: list[Any], masks: set[Path]) -> None:
    from ..weights.catalogue import BUILTIN, NONE

    report = options.report.resolve()
    weights = [
        Path(path).resolve()
        for path in (
            options.model,
            options.lora,
            options.vre,
            getattr(options, "osediff", None),
            getattr(options, "diffir", None),
        )
        if path not in (None, BUILTIN, NONE)
    ]
    files = [
        options.keep,
        getattr(options, "mask", None),
        *masks,
        Path(options.output),
        *(path for item in items for path in (item.source, item.target)),
    ]
    there = (
        [path for path in files if path and os.path.exists(path)] if os.path.exists(report) else []
    )
    if (
        any(report.is_relative_to(path) for path in weights)
        or any(path and path.resolve() == report for path in files)
        or any(path.samefile(report) for path in there)
    ):
        raise OSDFaceError(
            f"--report is {options.report}, which this run reads or makes itself: name another "
            "file."
        )


def _write_report(
    path: Path, options: argparse.Namespace, entries: list[dict[str, Any]], seconds: float
) -> None:
    from .pictures import replace_file
    from .restorer import versions

    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "command"
    }
    content = {
        "versions": versions(),
        "settings": settings,
        "seconds": round(seconds, 3),
        "files": entries,
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def fill(fresh: Path) -> None:
        fresh.write_text(text, encoding="utf-8")

    try:
        replace_file(path, fill)
    except OSError as error:
        raise OSDFaceError(
            f"--report is {path}, which cannot be written ({error.strerror or error}): name "
            "another file."
        ) from error
