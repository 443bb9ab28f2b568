"""Inputs of `denseseg predict`: files, folders, globs, lists, videos, streams; and how processes share them."""

import os
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_denseseg.data.reading.suffixes import image_suffixes
from hf_denseseg.data.sources.folders import list_pairs
from hf_denseseg.errors import InputError
from hf_denseseg.inference.predict.inputs import Found, Source, find_sources, items_of, read_input_image
from hf_denseseg.inference.predict.prediction import run_prediction
from hf_denseseg.inference.predict.processes import Processes
from hf_denseseg.inference.predict.video import read_frames, write_video

av = pytest.importorskip("av", reason="needs PyAV, the extra `video`")


def save(path, size=(8, 8), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (value, value, value)).save(path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """60 frames at 25 per second, frame k of gray value 4 k."""
    folder = tmp_path_factory.mktemp("video")
    files = [save(folder / f"{k:02d}.png", (32, 48), 4 * k) for k in range(60)]
    write_video(files, folder / "gray.mp4", Fraction(25))
    return folder / "gray.mp4"


def names(found):
    return [source.name for source in found.sources]


def test_every_form_of_input_gives_each_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b/c.jpg", "b/d/e.tif", "out/masks/a.png"):
        save(tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("not an image by its name")
    (tmp_path / "list.txt").write_text("b/c.jpg\n\nb/d/e.tif\n")
    output = tmp_path / "out"
    assert names(find_sources(["."], output)) == ["a", "b/c", "b/d/e"]
    assert names(find_sources(["b", "a.png", "b/c.jpg"], output)) == ["c", "d/e", "a"]
    assert names(find_sources(["b/*.jpg", "**/e.tif"], output)) == ["c", "e"]
    assert names(find_sources(["@list.txt", "a.png"], output)) == ["b/c", "b/d/e", "a"]
    streams = find_sources(["-", "rtsp://host/cam/front.sdp?user=a"], output).sources
    assert [(source.name, source.kind) for source in streams] == [("stdin", "stream"), ("front", "stream")]


def test_names_of_results_do_not_collide(tmp_path):
    for name in ("x/a.png", "x/a.jpg", "x/a.bmp", "y/a.png"):
        save(tmp_path / name)
    found = find_sources([str(tmp_path / "x"), str(tmp_path / "y")], tmp_path / "out")
    assert names(found) == ["a", "a_jpg", "a_png", "a_png_2"]


def test_frames_of_a_video_do_not_collide_with_a_folder_of_its_name(tmp_path, video):
    save(tmp_path / "clip/000000.png")
    (tmp_path / "clip.mp4").write_bytes(video.read_bytes())
    found = find_sources([str(tmp_path)], tmp_path / "out")
    assert names(found) == ["clip/000000", "clip_mp4"]
    assert next(items_of(found.sources[1])).name == "clip_mp4/000000"


def test_missing_files_of_a_list_and_forbidden_folders_are_reported(tmp_path, monkeypatch):
    save(tmp_path / "photos/a.png")
    save(tmp_path / "photos/secret/b.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path}/photos/a.png\n{tmp_path}/gone.png\n")
    found = find_sources([f"@{tmp_path}/list.txt"], tmp_path / "out")
    assert names(found) == ["a"] and [row["source"] for row in found.failed] == [f"{tmp_path}/gone.png"]
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    found = find_sources([str(tmp_path / "photos")], tmp_path / "out")
    assert names(found) == ["a"] and "Permission denied" in found.failed[0]["reason"]
    monkeypatch.undo()
    for given_input in ("@nothing.txt", str(tmp_path / "nothing"), str(tmp_path / "*.gif")):
        with pytest.raises(InputError, match="cannot be read|There is no image at"):
            find_sources([given_input], tmp_path / "out")


def test_a_decompression_bomb_is_refused_by_its_header_and_a_trusted_image_is_read(tmp_path):
    save(tmp_path / "a.png", (20, 30))
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(InputError, match=r"20x30 pixels, more than 599 .* --max_pixels 600"):
        read_input_image(str(tmp_path / "a.png"), 599)
    assert read_input_image(str(tmp_path / "a.png"), 600).size == (30, 20)
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(8))
    with pytest.raises(InputError, match="--max_pixels 2500000000"):
        read_input_image(str(tmp_path / "bomb.png"))
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("frame_stride", [1, 7])
def test_frames_come_in_order_with_number_and_time(video, frame_stride):
    frames = list(items_of(Source("v", str(video), "video"), frame_stride))
    assert [item.number for item in frames] == list(range(0, 60, frame_stride))
    for item in frames:
        assert item.name == f"v/{item.number:06d}"
        assert item.facts["seconds"] == pytest.approx(item.number / 25) and item.facts["frame_rate"] == "25"
        assert np.asarray(item.read()).mean() == pytest.approx(4 * item.number, abs=4)


def test_processes_share_the_frames_of_a_video(video):
    source = Source("v", str(video), "video")
    parts = [[item.number for item in items_of(source, 5, process=(rank, 3))] for rank in range(3)]
    assert parts == [[0, 15, 30, 45], [5, 20, 35, 50], [10, 25, 40, 55]]


def test_a_truncated_video_gives_its_complete_frames_and_then_the_reason(video, tmp_path):
    data = video.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    frames = []
    with pytest.raises(InputError, match="cannot be read beyond|is truncated after"):
        for frame in read_frames(str(tmp_path / "cut.mp4"), 1, 10**6):
            frames.append(frame.number)  # noqa: PERF402
    assert frames == list(range(len(frames))) and 5 < len(frames) < 60
    for content in (b"", b"not a video" * 99):
        (tmp_path / "none.mp4").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read|has no"):
            list(read_frames(str(tmp_path / "none.mp4"), 1, 10**6))
    with pytest.raises(InputError, match="--max_pixels 1536"):
        list(read_frames(str(video), 1, 1535))


def test_videos_keep_rate_and_size_and_have_the_same_bytes_each_time(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for k in range(12):
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(rng.integers(0, 256, (33, 47, 3), dtype=np.uint8)).save(files[-1])
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_video(files, tmp_path / name, Fraction(30000, 1001))
    assert len({(tmp_path / name).read_bytes() for name in ("a.mp4", "b.mp4", "c.mp4")}) == 1
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001)
        frames = [frame.to_image() for frame in container.decode(stream)]
    assert len(frames) == 12 and frames[0].size == (46, 32)  # colors are stored for 2x2 pixels


@given(weights=st.lists(st.integers(0, 100), max_size=30), count=st.integers(1, 5))
def test_each_task_goes_to_one_process_and_loads_are_balanced(weights, count):
    dealt = [Processes(rank, count).deal(weights) for rank in range(count)]
    assert sorted(task for tasks in dealt for task in tasks) == list(range(len(weights)))
    loads = [sum(weights[task] for task in tasks) for tasks in dealt]
    assert max(loads) - min(loads) <= max(weights, default=0)


def test_processes_use_one_gpu_each_and_refuse_to_share_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [Processes(k, 4, k).device(None) for k in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert Processes().device(None) == "cuda" and Processes(1, 2, 1).device("cpu") == "cpu"
    with pytest.raises(InputError, match="would be used by 2 processes"):
        Processes(0, 2).device("cuda:1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Processes(0, 2).device(None) == "cpu"


def test_processes_that_find_different_images_or_share_a_stream_are_refused(tmp_path, monkeypatch):
    def digests_of(sources):
        digests = []
        monkeypatch.setattr(Processes, "gather", lambda self, value: digests.append(value) or ["another", value])
        with pytest.raises(InputError, match="different images|cannot be shared"):
            run_prediction(None, Found(sources, []), tmp_path, processes=Processes(0, 2))
        return digests

    assert len(digests_of([Source("a", "a.png")])[0]) == 64
    assert digests_of([Source("stdin", "-", "stream")]) == []


FORMATS = (".jfif", ".jp2", ".gif", ".pgm", ".webp", ".avif", ".tga", ".bmp", ".TIF", ".qoi")


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_that_pillow_decodes_is_found_in_folders_and_read(tmp_path, suffix):
    image = Image.new("L" if suffix == ".pgm" else "RGB", (16, 8), 90)
    for folder in ("train/images", "train/labels"):
        (tmp_path / folder).mkdir(parents=True)
        image.save(tmp_path / folder / f"a{suffix}")
    found = find_sources([str(tmp_path / "train" / "images")], tmp_path / "out")
    assert names(found) == ["a"] and read_input_image(found.sources[0].origin).size == (16, 8)
    assert list(list_pairs(tmp_path, "train").images) == list(list_pairs(tmp_path, "train").labels) == ["a"]


def test_what_pillow_only_recognizes_is_no_image():
    assert not image_suffixes() & {".pdf", ".eps", ".h5", ".mpg", ".grib"}


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_input_image(str(tmp_path / "a.gif")).getpixel((0, 0))[0] > 200


def test_files_of_a_folder_that_are_passed_over_are_counted(tmp_path):
    for name in ("a.png", "b/c.png", "out/masks/d.png"):
        save(tmp_path / name)
    for name in ("1.txt", "b/2.txt", "b/3.TXT", "b/4.xml", "README", "out/5.txt"):
        (tmp_path / name).write_text("x")
    found = find_sources([str(tmp_path)], tmp_path / "out")
    assert names(found) == ["a", "b/c"] and found.passed_over == {".txt": 3, ".xml": 1, "": 1}
    assert found.describe_passed_over() == ", passed over 3 .txt, 1 suffixless, 1 .xml files"
    named = find_sources([str(tmp_path / "1.txt")], tmp_path / "out")  # tried, and left out with the reason
    assert names(named) == ["1"] and not named.describe_passed_over()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "6.txt").write_text("x")
    with pytest.raises(InputError, match="There is no image at .*, passed over 1 .txt files"):
        find_sources([str(tmp_path / "only")], tmp_path / "out")
