"""The files of a folder: which, in which order, and in how many bytes."""

import os
import pickle
import warnings
import zlib
from pathlib import Path

import pytest
import torch

from wejepa.config import default_config
from wejepa.data import FolderImages, listing, load_images
from wejepa.data.decoding import IMAGE_ENDINGS
from wejepa.data.listing import Files, class_folders, image_files
from wejepa.errors import DataError

NAMES = [
    "b/1.png", "b/2.JPG", "b/deep/er/0.jpeg", "b-side/1.png", "b.png", "a/10.png", "a/9.png", "a/notes.txt", "a/.hidden.png", "a/no_ending",
    ".cache/1.png", "a/.thumbs/1.png", "ä/ü.png", "B/1.webp", "top.gif", "empty/readme.md", "a/x.png.txt", "a/dotted.name.tiff", "a/..png",
]  # fmt: skip


def by_hand(folder: Path) -> list[Path]:
    """Plainly: every path as an object, sorted at the end."""

    def visible(paths):
        return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]

    tops = visible(folder.glob("*"))
    files = [f for top in tops for f in (visible(top.rglob("*")) if os.path.isdir(top) else [top])]
    return sorted(f for f in files if f.suffix.lower() in IMAGE_ENDINGS and (os.path.isfile(f) or not os.path.exists(f)))


@pytest.fixture
def tree(tmp_path) -> Path:
    folder = tmp_path / "train"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "b" / "album.jpg").mkdir()
    os.mkfifo(folder / "b" / "pipe.jpg")
    (folder / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (folder / "b" / "itself.jpg").symlink_to(folder / "b" / "itself.jpg")
    (folder / "b" / "there.jpg").symlink_to(folder / "top.gif")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.png").write_bytes(b"")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "linked").symlink_to(tmp_path / "elsewhere")  # not right below the folder: not followed
    return folder


def config(folder: Path):
    cfg = default_config()
    cfg.data.dataset, cfg.data.root = "imagefolder", str(folder.parent)
    return cfg


def test_the_files_are_those_that_pathlib_finds_in_its_order(tree):
    files = Files(tree, image_files(tree))
    assert list(files) == by_hand(tree) and len(files) > 12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = load_images(config(tree))
    assert source.files == files and source.classes == ("", "B", "a", "b", "b-side", "empty", "linked", "ä")
    inside = [path.relative_to(tree) for path in by_hand(tree)]
    assert [source.classes[c] for c in source.labels.tolist()] == [path.parts[0] if len(path.parts) > 1 else "" for path in inside]
    posix = "\n".join(sorted(path.as_posix() for path in inside))
    assert source.fingerprint == f"{len(inside)} files, {zlib.crc32(os.fsencode(posix)):08x}"
    assert class_folders(tree) == ["B", "a", "b", "b-side", "empty", "linked", "ä"] and class_folders(tree / "nowhere") == []


def test_files_are_a_sequence_of_paths(tmp_path):
    names = ["a/1.png", os.fsdecode(b"a/\xff.png"), "ä.png"]
    files = Files(tmp_path, names)
    paths = [tmp_path / name for name in names]
    assert (
        len(files) == 3 and list(files) == paths == files and files[1] == paths[1] and files[-1] == paths[-1] and files[::2] == paths[::2]
    )
    assert paths[2] in files and files.index(paths[1]) == 1 and files != paths[:2] and files.name(0) == "a/1.png"
    assert pickle.loads(pickle.dumps(files)) == files and not Files(tmp_path, [])
    for beyond in (3, -4):
        with pytest.raises(IndexError):
            files[beyond]


def test_a_plain_list_of_paths_serves_as_well(tmp_path):
    paths = [tmp_path / "b" / "2.png", tmp_path / "1.png"]
    shape = {"img_size": 8, "in_chans": 3, "mean": (0,), "std": (1,), "num_workers": 0, "max_unreadable_share": 1}
    source = FolderImages(tmp_path, paths, torch.zeros(2, dtype=torch.long), ("only",), **shape)
    assert source.files == paths and source.fingerprint == f"2 files, {zlib.crc32(b'1.png' + bytes([10]) + b'b/2.png'):08x}"


def test_many_files_take_few_bytes(tmp_path):
    """What a worker process is sent: some thirty bytes a file, where a list of paths takes three hundred."""
    files = Files(tmp_path, (f"class_{i % 10}/{i:07d}.jpg" for i in range(20_000)))
    assert len(pickle.dumps(files)) < 20_000 * 35
    shape = {"img_size": 8, "in_chans": 3, "mean": (0,), "std": (1,), "num_workers": 0, "max_unreadable_share": 1}
    source = FolderImages(tmp_path, files, torch.zeros(20_000, dtype=torch.long), ("only",), **shape)
    assert len(pickle.dumps(source.decoder)) < 20_000 * 35 and source.decoder.files is files


def test_a_folder_that_may_not_be_listed_is_named(tree, monkeypatch):
    whole, scandir = list(image_files(tree)), os.scandir

    def refusing(where, error):
        def listed(path):
            if os.fspath(path) == str(tree / where):
                raise error
            return scandir(path)

        monkeypatch.setattr(listing.os, "scandir", listed)

    refusing("b", PermissionError(13, "Permission denied"))
    with pytest.warns(UserWarning, match=r"train.b cannot be listed \(Permission denied\): what is in it is left out"):
        rest = list(image_files(tree))
    assert rest == [name for name in whole if not name.startswith("b/")] and len(rest) < len(whole)
    refusing("b", OSError(5, "Input/output error"))
    with pytest.raises(DataError, match=r"train.b cannot be listed \(Input/output error\): check the disk"):
        list(image_files(tree))
