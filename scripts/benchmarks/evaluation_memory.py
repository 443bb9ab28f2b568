"""Peak memory of `SegmentationTrainer.evaluate` with 50 and with 500 images of 512x1024, in separate processes.

The model is a small strided convolution with 19 classes and the images are made on the fly, so only what the
evaluation keeps can grow. The default of transformers keeps about 167 MiB per image of 512x512 pixels and 150 classes.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

CLASSES, SIZE = 19, (512, 1024)


class ToyConfig(PreTrainedConfig):
    """Configuration of the toy model."""

    model_type = "evaluation_memory_toy"


class ToyModel(PreTrainedModel):
    """One strided convolution: memory depends on the image's size, not on the model's."""

    config: ToyConfig
    config_class = ToyConfig

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.projection = nn.Conv2d(3, CLASSES, kernel_size=8, stride=8)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> SemanticSegmenterOutput:
        """Logits at an eighth of the image's size."""
        return SemanticSegmenterOutput(logits=self.projection(pixel_values))


class NoiseDataset(Dataset):
    """Noise and random labels, some of them ignored, in the form of `EvalDataset`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        image = torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)
        label = image[0] % (CLASSES + 1)
        return {"index": index, "image": image, "label": torch.where(label == CLASSES, 255, label), "id": str(index)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--few", type=int, default=50, help="images of the first run (default 50)")
    parser.add_argument("--many", type=int, default=500, help="images of the second run (default 500)")


def measure(count: int) -> dict:
    """Evaluate `count` images in this process; peak resident memory in MiB."""
    from hf_denseseg.data.labels import LabelSpec
    from hf_denseseg.inference.segmentation import InferenceSettings
    from hf_denseseg.training.arguments import TaskTrainingArguments
    from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TaskTrainingArguments(
            output_dir=folder, use_cpu=True, per_device_eval_batch_size=2, report_to="none", disable_tqdm=True
        )
        trainer = SegmentationTrainer(
            ToyModel(ToyConfig()),
            arguments,
            image_processor=SegformerImageProcessor(),
            spec=LabelSpec("toy", tuple(f"class {k}" for k in range(CLASSES))),
            settings=InferenceSettings(),
            eval_dataset=NoiseDataset(count),
        )
        scores = trainer.evaluate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pixels = sum(row["pixels"] for row in trainer.scores["per_class"])
    return {"peak_mib": peak, "mean_iou": scores["eval_mean_iou"], "labeled_pixels": pixels}


def run(args: argparse.Namespace) -> dict:
    figures: dict = {}
    for name, count in (("few", args.few), ("many", args.many)):
        done = subprocess.run([sys.executable, __file__, str(count)], capture_output=True, text=True, check=True)
        figures[name] = {"images": count, **json.loads(done.stdout.strip().splitlines()[-1])}
    figures["growth_mib"] = figures["many"]["peak_mib"] - figures["few"]["peak_mib"]
    figures["target_growth_mib"] = 50.0
    return figures


def readme_rows(result: dict) -> list[tuple[str, str, str]]:
    """(what, ours, peer) for the table of the README."""
    growth = result["figures"]["growth_mib"]
    return [("evaluating 500 images instead of 50", f"{growth:.1f} MiB more", "–")]


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
