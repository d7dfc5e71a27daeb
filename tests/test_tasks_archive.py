import io
import tarfile
import zipfile

import pytest

from lamina.errors import TaskError
from task_helpers import archive as archives
from task_helpers.archive import extract


def zip_bytes(members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def tar_bytes(members, link=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            file.addfile(info)
    return buffer.getvalue()


def left_over(cache):
    return sorted(path.name for path in cache.iterdir())


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../evil", "C:\\evil", ""])
@pytest.mark.parametrize("pack", [zip_bytes, tar_bytes])
def test_members_outside_the_archive_are_refused(tmp_path, pack, name):
    file = tmp_path / "archive"
    file.write_bytes(pack({name or "x": b"evil"}))
    with pytest.raises(TaskError, match="points outside"):
        extract(file, name, tmp_path / "out")
    assert left_over(tmp_path) == ["archive"]


def test_links_are_refused(tmp_path):
    zipped, tarred = tmp_path / "z", tmp_path / "t"
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr(info, "/etc/hostname")
    tarred.write_bytes(tar_bytes({}, link="link"))
    for file in (zipped, tarred):
        with pytest.raises(TaskError, match="not a plain file"):
            extract(file, "link", tmp_path / "out")


def test_a_member_larger_than_allowed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 3)
    (tmp_path / "z").write_bytes(zip_bytes({"thing/a.txt": b"alpha"}))
    with pytest.raises(TaskError, match="unpacks to more"):
        extract(tmp_path / "z", "thing/a.txt", tmp_path / "out")


def test_an_archive_inside_an_archive(tmp_path):
    file, out = tmp_path / "outer.tar.gz", tmp_path / "out"
    file.write_bytes(tar_bytes({"p/inner.tar.gz": tar_bytes({"q/text": b"found"})}))
    extract(file, "p/inner.tar.gz!q/text", out)
    assert out.read_bytes() == b"found"
    assert left_over(tmp_path) == ["out", "outer.tar.gz"]
    with pytest.raises(TaskError, match=r"inner\.tar\.gz has no member 'q/tekst'"):
        extract(file, "p/inner.tar.gz!q/tekst", out)


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", tar_bytes({"m": b"x" * 9999})[:-20]],
    ids=["empty", "text", "cut off"],  # the bytes of an archive tell the time
)
def test_a_damaged_archive_is_named(tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(TaskError, match=r"archive bad cannot be read.*fetch it anew"):
        extract(tmp_path / "bad", "m", tmp_path / "out")
