"""What becomes of every file of a folder: `python -m benchmarks.many_pictures DIR`.

Restores all of them by the small built-in model in one run, as the command line does, and prints a
table. A raw error of Python is a violation. The files are looked at afterwards: what is called
copied is the same bytes, and every restored one is opened and each of its pictures read, at the
size and in the number of the file it was made from. Pillow's own test pictures
(github.com/python-pillow/Pillow, Tests/images) are a good DIR.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from osdface_core import cli
from osdface_core.cli import pictures

RAW = re.compile(r"^[A-Za-z_.]*([Ee]rror|Exception|Warning|Exit): ")


def pictures_of(path: Path) -> list[tuple[int, int]]:
    """The sizes of all pictures in a file, each read to its end."""
    sizes = []
    with pictures.opened(path) as image:
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            sizes.append(image.size)
    return sizes


def fault(source: Path, target: Path) -> str:
    """What is wrong with a restored file; nothing if it is as it should be."""
    try:
        after = pictures_of(target)
    except Exception as error:  # each of Pillow's readers raises its own errors
        return f"cannot be opened: {error!r}"
    before = pictures_of(source)
    if len(after) != len(before):
        return f"{len(after)} pictures of {len(before)}"
    if any(sorted(one) != sorted(other) for one, other in zip(before, after, strict=True)):
        return f"sizes {after} of {before}"
    return ""


def verdict(entry: dict, source: Path, target: Path) -> str:
    """What became of a file."""
    if entry["status"] == "skipped":
        return "skipped"
    if entry["status"] == "failed":
        return "VIOLATION" if RAW.match(entry["error"]) else "one sentence"
    if not target.is_file():
        return "VIOLATION"
    same = target.read_bytes() == source.read_bytes()
    chosen = any(face["verdict"] == "chosen" for face in entry.get("faces", ()))
    if same:
        return "VIOLATION" if chosen else "copied"
    if not chosen:
        return "VIOLATION"
    entry["error"] = fault(source, target)
    return "VIOLATION" if entry["error"] else "done"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, help="keep the outputs here")
    parser.add_argument("--sentences", action="store_true", help="print each sentence")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch) / "out"
        report = Path(scratch) / "report.json"
        files = ["restore", str(options.folder), f"{out}/", "--overwrite"]
        code = cli.main([*files, "--model", "builtin", "--report", str(report)])
        entries = json.loads(report.read_text(encoding="utf-8"))["files"]
        there = [path for path in options.folder.rglob("*") if path.is_file()]
        counts: Counter[str] = Counter()
        for entry in entries:
            what = verdict(entry, Path(entry["input"]), Path(entry["output"]))
            counts[what] += 1
            if what == "VIOLATION" or (options.sentences and what in ("one sentence", "skipped")):
                print(f"{what}: {entry['input']}: {entry.get('error') or entry.get('reason', '')}")
    print(f"\n| what became of it | of {len(there)} files |\n|---|---|")
    for what in ("done", "copied", "one sentence", "skipped", "VIOLATION"):
        print(f"| {what} | {counts[what]} |")
    print(f"exit code {code}")
    return 1 if counts["VIOLATION"] else 0


if __name__ == "__main__":
    sys.exit(main())
