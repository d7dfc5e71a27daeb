import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from lamina.errors import TaskError
from task_helpers import download
from task_helpers import fetch as fetching
from task_helpers.fetch import Package, cache_root, fetch


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


CONTENT = zip_bytes({"thing/a.txt": b"alpha", "thing/b.txt": b"beta", "thing/c.txt": b"gamma"})


def package(content=CONTENT, **changes):
    settings = {
        "what": "the thing",
        "name": "thing",
        "version": "1.2",
        "sha256": hashlib.sha256(content).hexdigest(),
        "megabytes": 0.1,
        "members": {"a.txt": "thing/a.txt", "b.txt": "thing/b.txt"},
    }
    return Package(**(settings | changes))


def serve(content=CONTENT, calls=None):
    def fake(wanted, folder):
        if calls is not None:
            calls.append(wanted.pin)
        file = folder / "thing.whl"
        file.write_bytes(content)
        return file

    return fake


def left_over(cache):
    return sorted(path.name for path in cache.iterdir())


# ---------------------------------------------------------------------------------- the good case


def test_gives_the_wanted_files_and_says_so_once(tmp_path, capsys):
    calls = []
    first = fetch(package(), cache=tmp_path, download=serve(calls=calls))
    said = capsys.readouterr()
    second = fetch(package(), cache=tmp_path, download=serve(calls=calls))
    assert first == second
    assert calls == ["thing==1.2"]
    assert (first / "a.txt").read_bytes() == b"alpha"
    assert sorted(path.name for path in first.iterdir()) == ["a.txt", "b.txt", "complete.json"]
    assert left_over(tmp_path) == [first.name]
    assert said.out == ""
    assert said.err.count("\n") == 2
    assert "the thing" in said.err
    assert capsys.readouterr().err == ""


def test_another_pin_or_choice_is_another_folder():
    folders = {
        package().folder,
        package(version="1.3").folder,
        package(sha256="0" * 64).folder,
        package(members={"a.txt": "thing/a.txt"}).folder,
    }
    assert len(folders) == 4


@pytest.mark.parametrize("damage", ["shorten", "remove", "manifest"])
def test_a_damaged_cache_is_fetched_anew(tmp_path, damage):
    home = fetch(package(), cache=tmp_path, download=serve())
    if damage == "shorten":
        (home / "a.txt").write_bytes(b"al")
    elif damage == "remove":
        (home / "b.txt").unlink()
    else:
        (home / "complete.json").write_text("[1", encoding="utf-8")
    fetch(package(), cache=tmp_path, download=serve())
    assert (home / "a.txt").read_bytes() == b"alpha"
    assert left_over(tmp_path) == [home.name]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    monkeypatch.delenv("LAMINA_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "lamina"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert cache_root() == Path.home() / ".cache" / "lamina"


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_wrong_checksum_keeps_nothing(tmp_path):
    with pytest.raises(TaskError, match=r"thing==1\.2.*checksum is wrong.*Nothing was kept"):
        fetch(package(), cache=tmp_path, download=serve(CONTENT + b"x"))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_download_leaves_nothing(tmp_path, interruption):
    def broken(wanted, folder):
        (folder / "thing.whl").write_bytes(CONTENT[:20])
        raise interruption

    with pytest.raises(interruption):
        fetch(package(), cache=tmp_path, download=broken)
    assert left_over(tmp_path) == []


def test_an_interrupted_extraction_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "publish", stop)
    with pytest.raises(KeyboardInterrupt):
        fetch(package(), cache=tmp_path, download=serve())
    assert left_over(tmp_path) == []


def test_what_a_killed_process_left_is_swept_a_day_later(tmp_path):
    old, young = tmp_path / ".fetch-old", tmp_path / ".fetch-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "half").write_bytes(b"x")
    os.utime(old, (time.time() - 2 * fetching.STALE_SECONDS,) * 2)
    home = fetch(package(), cache=tmp_path, download=serve())
    assert left_over(tmp_path) == [".fetch-young", home.name]


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(TaskError, match=r"cannot be written.*LAMINA_CACHE"):
        fetch(package(), cache=blocked / "cache", download=serve())


@pytest.mark.parametrize("name", ["../evil.txt", "/evil.txt", "sub/evil.txt", "complete.json", ""])
def test_files_are_kept_under_plain_names_only(tmp_path, name):
    with pytest.raises(TaskError, match="plain file name"):
        fetch(package(members={name: "thing/a.txt"}), cache=tmp_path / "c", download=serve())
    assert left_over(tmp_path) == ["c"]
    assert left_over(tmp_path / "c") == []


def test_two_fetches_at_once_both_succeed(tmp_path):
    both = threading.Barrier(2)

    def together(wanted, folder):
        both.wait(10)
        return serve()(wanted, folder)

    homes = []
    threads = [
        threading.Thread(
            target=lambda: homes.append(fetch(package(), cache=tmp_path, download=together))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert homes == [tmp_path / package().folder] * 2
    assert fetching.is_complete(homes[0], package())
    assert left_over(tmp_path) == [homes[0].name]


# -------------------------------------------------------------------------------------------- pip


def fake_pip(monkeypatch, script):
    """Run a Python script, given the destination folder as an argument, in place of pip."""
    original = download.command

    def command(wanted, folder, target):
        original(wanted, folder, target)
        return [sys.executable, "-c", script, str(target)]

    monkeypatch.setattr(download, "command", command)
    monkeypatch.setattr(download, "POLL_SECONDS", 0.01)


def test_the_pip_command_pins_version_and_checksum(tmp_path):
    wheel = download.command(package(), tmp_path, tmp_path / "to")
    assert wheel[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(wheel)
    assert wheel[wheel.index("--only-binary") + 1] == "thing"
    assert (tmp_path / "wanted.txt").read_text() == f"thing==1.2 --hash=sha256:{package().sha256}\n"
    source = download.command(package(source=True), tmp_path, tmp_path / "to")
    assert source[source.index("--no-binary") + 1] == "thing"


def test_through_a_process(tmp_path, monkeypatch):
    (tmp_path / "served").write_bytes(CONTENT)
    fake_pip(
        monkeypatch,
        f"import shutil, sys; shutil.copy({str(tmp_path / 'served')!r}, sys.argv[1])",
    )
    home = fetch(package(), cache=tmp_path / "cache")
    assert json.loads((home / "complete.json").read_text()) == {"a.txt": 5, "b.txt": 4}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("ERROR: Could not find a version that satisfies thing", "satisfies thing"),
        ("WARNING: connection broken by 'NameError: no name': /x\nERROR: No match", "be reached"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "checksum of the file"),
        ("", "printed nothing"),
    ],
)
def test_a_failing_pip_is_explained(tmp_path, monkeypatch, output, reason):
    fake_pip(monkeypatch, f"print({output!r}, end=''); raise SystemExit(1)")
    with pytest.raises(TaskError) as caught:
        fetch(package(), cache=tmp_path)
    message = str(caught.value)
    assert message.startswith("the thing (thing==1.2) was not fetched")
    assert reason in message
    assert "\n" not in message
    assert left_over(tmp_path) == []


def test_an_unreachable_index_is_told_without_pips_internals():
    line = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
        "'<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish "
        "a new connection: [Errno 111] Connection refused')': /simple/thing/"
    )
    message = str(download.failure(package(), 1, f"{line}\nERROR: No matching distribution"))
    cause = "Failed to establish a new connection: [Errno 111] Connection refused"
    assert f"pip ended with code 1 (the package index cannot be reached: {cause})" in message


def test_python_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"no pip.*ensurepip"):
        fetch(package(), cache=tmp_path)
    assert left_over(tmp_path) == []


def test_an_interruption_ends_pip(tmp_path, monkeypatch):
    fake_pip(monkeypatch, "import time; time.sleep(60)")
    started = []
    original = subprocess.Popen

    def popen(*args, **kwargs):
        started.append(original(*args, **kwargs))
        return started[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.subprocess, "Popen", popen)
    monkeypatch.setattr(download, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(package(), cache=tmp_path)
    assert started[0].returncode is not None
    assert left_over(tmp_path) == []
