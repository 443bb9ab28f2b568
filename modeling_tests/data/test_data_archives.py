"""Archives are read without unpacking: the same bytes as from a folder, and unsafe or damaged ones are rejected."""

import io
import multiprocessing
import stat
import struct
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_denseseg.data.reading import references
from hf_denseseg.data.reading.archives import open_tree
from hf_denseseg.data.reading.references import describe_reference, read_reference
from hf_denseseg.errors import InputError

FILES = {"a/one.txt": b"one" * 500, "a/b/two.bin": bytes(range(256)), "three.txt": b""}


def write_zip(path, files=None, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in (FILES if files is None else files).items():
            archive.writestr(name, content)
    return path


def write_tar(path, files=None, mode="w", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as archive:
        for name, content in (FILES if files is None else files).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path, files=None):
    for name, content in (FILES if files is None else files).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


WRITERS = {
    "folder": lambda path: write_folder(path / "d"),
    "zip": lambda path: write_zip(path / "d.zip"),
    "stored zip": lambda path: write_zip(path / "d.zip", method=zipfile.ZIP_STORED),
    "tar": lambda path: write_tar(path / "d.tar"),
    "gnu tar": lambda path: write_tar(path / "d.tar", form=tarfile.GNU_FORMAT),
    "tar.gz": lambda path: write_tar(path / "d.tar.gz", mode="w:gz"),
}


@pytest.mark.parametrize("form", WRITERS)
def test_every_format_lists_the_same_files(tmp_path, form):
    tree = open_tree(WRITERS[form](tmp_path))
    assert tree.names() == sorted(FILES)
    for name, content in FILES.items():
        assert tree.read(name) == read_reference(tree.reference(name)) == content
    assert tree.glob("a/*.txt") == ["a/one.txt"] and tree.glob("**/*.bin") == ["a/b/two.bin"]
    assert tree.glob("**/*.txt") == ["a/one.txt", "three.txt"]
    assert "a/b/two.bin" in describe_reference(tree.reference("a/b/two.bin"))
    with pytest.raises(InputError, match=r"contains no file a/none\.txt"):
        tree.read("a/none.txt")


def test_an_unpacked_file_takes_precedence_over_an_archive_member(tmp_path):
    write_zip(tmp_path / "b.zip", {"x/1.txt": b"zip b", "x/2.txt": b"zip b", "readme": b"b"})
    write_tar(tmp_path / "a.tar", {"x/2.txt": b"tar a", "readme": b"a"})
    write_folder(tmp_path, {"x/1.txt": b"unpacked"})
    write_zip(tmp_path / "x/c.zip", {"3.txt": b"inside x"})
    tree = open_tree(tmp_path)
    read = {name: tree.read(name) for name in tree.names()}
    assert read == {"x/1.txt": b"unpacked", "x/2.txt": b"tar a", "x/3.txt": b"inside x", "readme": b"a"}
    assert "b.zip" in open_tree(tmp_path, archives=("a.*",)).names()


def test_a_tar_of_tars_is_listed_as_folders(tmp_path):
    inner = {
        name: write_tar(tmp_path / f"{name}.tar", {f"{name}_1.JPEG": name.encode(), f"{name}_2.JPEG": b"two"})
        for name in ("n01", "n02")
    }
    outer = write_tar(tmp_path / "train.tar", {path.name: path.read_bytes() for path in inner.values()})
    for path in inner.values():
        path.unlink()
    tree = open_tree(outer)
    assert tree.names() == [f"{name}/{name}_{k}.JPEG" for name in ("n01", "n02") for k in (1, 2)]
    assert tree.read("n02/n02_1.JPEG") == b"n02" and tree.read("n01/n01_2.JPEG") == b"two"


def test_forked_processes_read_the_same_archive_concurrently(tmp_path):
    """With a shared file position, one process would read the bytes that another one asked for."""
    files = {f"{k}": bytes([k]) * 40_000 for k in range(40)}
    tree = open_tree(write_zip(tmp_path / "d.zip", files))
    assert tree.read("0") == files["0"]  # the handle is open before the fork
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(read_reference, [tree.reference(str(k % 40)) for k in range(400)], chunksize=1)
    assert all(content == files[str(k % 40)] for k, content in enumerate(found))


def tar_member(path, name="x", kind=tarfile.REGTYPE, size=0, link=""):
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.linkname = kind, size, link
        archive.addfile(member, io.BytesIO(b"\0" * size))
    return path


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "C:/x", "a\\..\\x", "\\\\host\\x", "a::b"])
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_lead_out_of_the_archive_are_rejected(tmp_path, write, name):
    path = write(tmp_path / ("d.zip" if write is write_zip else "d.tar"), {"good": b"1", name: b"2"})
    with pytest.raises(InputError, match=r"d\.(zip|tar): member .* (leads out|no file can have)"):
        open_tree(path)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_rejected(tmp_path, kind):
    with pytest.raises(InputError, match="member 'x' is a link or a device"):
        open_tree(tar_member(tmp_path / "d.tar", kind=kind, link="/etc/passwd"))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        member = zipfile.ZipInfo("x")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(InputError, match="member 'x' is a link or a device"):
        open_tree(tmp_path / "d.zip")


def test_a_duplicate_name_is_rejected(tmp_path):
    with pytest.warns(UserWarning), zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("x", b"1")
        archive.writestr("x", b"2")
    with pytest.raises(InputError, match="'x' occurs more than once"):
        open_tree(tmp_path / "d.zip")


def changed(path, old, new, last=False):
    content = path.read_bytes()
    place = content.rfind(old) if last else content.find(old)
    assert place >= 0
    path.write_bytes(content[:place] + new + content[place + len(old) :])
    return path


def test_encrypted_members_are_rejected(tmp_path):
    path = write_zip(tmp_path / "d.zip", {"x": b"1"})
    entry = path.read_bytes().rfind(b"PK\x01\x02")
    content = bytearray(path.read_bytes())
    content[entry + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="member 'x' is encrypted"):
        open_tree(path)


def test_a_member_never_unpacks_to_more_than_its_header_or_the_limit(tmp_path):
    bomb = write_zip(tmp_path / "d.zip", {"x": b"\0" * 5_000_000})
    tree = open_tree(bomb)
    with pytest.raises(InputError, match="stated size above the limit of 1,000,000 bytes"):
        tree.read("x", limit=1_000_000)
    # The directory now states 100 bytes. Reading stops there.
    lying = changed(bomb, struct.pack("<I", 5_000_000), struct.pack("<I", 100), last=True)
    with pytest.raises(InputError, match="is larger than the archive's directory states"):
        open_tree(lying).read("x")
    with pytest.raises(InputError, match="stated size above the limit"):
        open_tree(tar_member(tmp_path / "d.tar", size=2_000_000)).read("x", limit=1_000_000)


def test_a_gzip_bomb_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(references, "GZIP_LIMIT", 1_000_000)
    path = write_tar(tmp_path / "d.tar.gz", {"x": b"\0" * 5_000_000}, mode="w:gz")
    with pytest.raises(InputError, match="more than 1,000,000 bytes unpacked"):
        open_tree(path)


def test_a_tar_header_cannot_request_gigabytes(tmp_path):
    """Otherwise listing would read a long name of any size into memory."""
    with pytest.raises(InputError, match="truncated or damaged"):
        open_tree(tar_member(tmp_path / "d.tar", kind=tarfile.GNUTYPE_LONGNAME, size=3 * 2**20))


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_archive_is_rejected(tmp_path, form, fraction):
    path = WRITERS[form](tmp_path)
    content = path.read_bytes().rstrip(b"\0")  # a tar is padded
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(InputError, match=r"Archive .*(truncated|damaged)"):
        open_tree(path)


def test_a_tar_truncated_between_two_members_is_rejected(tmp_path):
    path = write_tar(tmp_path / "d.tar", {"x": b"1" * 512, "y": b"2" * 512})
    path.write_bytes(path.read_bytes()[: 4 * 512])
    with pytest.raises(InputError, match="the end-of-archive block is missing"):
        open_tree(path)


def test_changed_bytes_are_detected(tmp_path):
    path = write_zip(tmp_path / "d.zip", {"x": b"abcdefgh" * 4}, method=zipfile.ZIP_STORED)
    with pytest.raises(InputError, match=r"d\.zip: member 'x' is damaged"):
        open_tree(changed(path, b"abcdefgh", b"abcdefgX")).read("x")


@pytest.mark.parametrize("form", ["zip", "tar", "tar.gz"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(places=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_archives_are_read_correctly_or_rejected(tmp_path_factory, form, places):
    """Whatever bytes change: no error but InputError, and a zip member never yields wrong bytes."""
    path = WRITERS[form](tmp_path_factory.mktemp("d"))
    content = bytearray(path.read_bytes())
    for place, value in places:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        tree = open_tree(path)
    except InputError:
        return
    for name in tree.names():
        try:
            found = tree.read(name)
        except InputError:
            continue
        assert not ("/" not in name and name.startswith("..")) and (form != "zip" or found in FILES.values())


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_arbitrary_text_as_reference_is_rejected(text):
    with pytest.raises(InputError):
        read_reference(f"zip://{text}")
