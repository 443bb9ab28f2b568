"""Archives are read as they are: the same bytes as unpacked, and nothing that hides in one gets out."""

import io
import tarfile
import zipfile

import pytest

from hf_denseseg.data.archives import describe_reference, open_tree, read_reference
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
def test_every_form_shows_the_same_files(tmp_path, form):
    tree = open_tree(WRITERS[form](tmp_path))
    assert tree.names() == sorted(FILES)
    for name, content in FILES.items():
        assert tree.read(name) == read_reference(tree.reference(name)) == content
    assert tree.glob("a/*.txt") == ["a/one.txt"] and tree.glob("**/*.bin") == ["a/b/two.bin"]
    assert tree.glob("**/*.txt") == ["a/one.txt", "three.txt"]
    assert "a/b/two.bin" in describe_reference(tree.reference("a/b/two.bin"))
    with pytest.raises(InputError, match=r"no file a/none\.txt"):
        tree.read("a/none.txt")
