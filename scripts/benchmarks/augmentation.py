"""CPU time per training sample, against mmsegmentation's pipeline written with OpenCV and numpy.

Both read a 683x512 JPEG and a PNG label map and give a 512x512 crop: resize ratio 0.5-2, crop with the 75 % rule,
flip, photometric distortion, pad. The peer normalizes to float32 as mmsegmentation does; ours returns uint8, which is
normalized on the device. `peer_uint8` leaves that step out of the peer too. Needs OpenCV, for the peer only:
`pip install opencv-python-headless`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from hf_denseseg.data.augmentation.segmentation import TrainAugmentation, TrainDataset
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC, render_scene
from hf_denseseg.files import write_atomic

CROP = 512
MEAN = np.array([123.675, 116.28, 103.53], dtype=np.float64)
STD = np.array([58.395, 57.12, 57.375], dtype=np.float64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=24, help="pairs in the folder (default 24)")
    parser.add_argument("--rounds", type=int, default=7, help="alternations of the three (default 7)")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Median CPU milliseconds per sample of each, measured in turns, and our ratio to each peer."""
    try:
        import cv2
    except ImportError as error:
        raise SystemExit("The peer needs OpenCV: pip install opencv-python-headless") from error
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        pairs = write_pairs(Path(folder), args.images)
        data = load_segmentation(folder, "train")
        ours = TrainDataset(data, TrainAugmentation((CROP, CROP)), seed=0)
        contenders: dict[str, Callable[[int, int], object]] = {
            "ours": lambda epoch, index: ours[epoch, index],
            "peer": lambda epoch, index: peer_sample(cv2, *pairs[index], np.random.default_rng((epoch, index))),
            "peer_uint8": lambda epoch, index: peer_sample(
                cv2, *pairs[index], np.random.default_rng((epoch, index)), normalize=False
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for epoch in range(args.rounds + 1):
            for name, sample in contenders.items():
                started = time.process_time()
                for index in range(args.images):
                    sample(epoch, index)
                if epoch:  # the first round warms up
                    times[name].append((time.process_time() - started) / args.images * 1000)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "cpu_ms_per_sample": medians,
        "ratio_to_peer": statistics.median(a / b for a, b in zip(times["ours"], times["peer"], strict=True)),
        "ratio_to_peer_uint8": statistics.median(
            a / b for a, b in zip(times["ours"], times["peer_uint8"], strict=True)
        ),
        "target_ratio_to_peer": 1.3,
        "opencv": cv2.__version__,
        "pillow": Image.__version__,
    }


def write_pairs(folder: Path, count: int) -> list[tuple[Path, Path]]:
    """Synthetic scenes of 512x683 as JPEG and PNG."""
    pairs = []
    for index in range(count):
        paths = folder / "train/images" / f"{index:03d}.jpg", folder / "train/labels" / f"{index:03d}.png"
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        image, label = render_scene("train", index, (512, 683))
        image.save(paths[0], quality=92)
        Image.fromarray(label).save(paths[1])
        pairs.append(paths)
    write_atomic(folder / "labels.json", '{"classes": ["' + '", "'.join(SYNTHETIC_SPEC.classes) + '"]}')
    return pairs


def peer_sample(
    cv2: ModuleType, image_path: Path, label_path: Path, rng: np.random.Generator, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """mmsegmentation's default training pipeline, step by step, with OpenCV and numpy."""
    image = cv2.imdecode(np.fromfile(image_path, np.uint8), cv2.IMREAD_COLOR)
    label = cv2.imdecode(np.fromfile(label_path, np.uint8), cv2.IMREAD_UNCHANGED)
    ratio = rng.random() * 1.5 + 0.5
    size = (int(image.shape[1] * ratio + 0.5), int(image.shape[0] * ratio + 0.5))
    image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)
    for attempt in range(11):
        top = rng.integers(max(label.shape[0] - CROP, 0) + 1)
        left = rng.integers(max(label.shape[1] - CROP, 0) + 1)
        cut = label[top : top + CROP, left : left + CROP]
        # mmsegmentation calls `np.unique`, which is slower: the peer is given the fastest count.
        counts = cv2.calcHist([np.ascontiguousarray(cut)], [0], None, [255], [0, 255])
        if attempt == 10 or ((counts > 0).sum() > 1 and counts.max() / counts.sum() < 0.75):
            break
    image, label = image[top : top + CROP, left : left + CROP], cut
    if rng.random() < 0.5:
        image, label = cv2.flip(image, 1), cv2.flip(label, 1)
    image = peer_distort(cv2, image, rng)
    if normalize:
        image = cv2.cvtColor(image.astype(np.float32), cv2.COLOR_BGR2RGB)
        cv2.subtract(image, MEAN.reshape(1, -1), image)
        cv2.multiply(image, 1 / STD.reshape(1, -1), image)
    missing = (0, CROP - image.shape[0], 0, CROP - image.shape[1])
    image = cv2.copyMakeBorder(image, *missing, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    label = cv2.copyMakeBorder(label, *missing, cv2.BORDER_CONSTANT, value=255)
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels, torch.from_numpy(label.astype(np.int64) if normalize else label)


def peer_distort(cv2: ModuleType, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation, hue, each with probability 1/2."""

    def convert(pixels: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
        return np.clip(pixels.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

    if rng.integers(2):
        image = convert(image, offset=rng.uniform(-32, 32))
    contrast_first = rng.integers(2)
    if contrast_first and rng.integers(2):
        image = convert(image, factor=rng.uniform(0.5, 1.5))
    if rng.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 1] = convert(hsv[:, :, 1], factor=rng.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if rng.integers(2):
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    if not contrast_first and rng.integers(2):
        image = convert(image, factor=rng.uniform(0.5, 1.5))
    return image


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    ratio = result["figures"]["ratio_to_peer"]
    return [("augmentation, decode included", f"{ratio:.2f}x the CPU time", "OpenCV + numpy")]
