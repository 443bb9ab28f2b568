"""Rank the labels of a split that a checkpoint contradicts; an interrupted ranking continues."""

import heapq
import logging
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from hf_denseseg.evaluation.label_doubt import Region, doubtful_regions
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.predict.runner import run
from hf_denseseg.reports.doubts_page import Outlined, doubts_table, write_doubts_page
from hf_denseseg.training.evaluation import open_journal, prepare_model, processes_of, work_of
from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer
from hf_denseseg.visualization.evaluation import outlined_row

logger = logging.getLogger(__name__)

JOURNAL = "doubt_journal"
MOST = 10_000  # regions that are kept and listed, of any number of images
SHOWN = 24  # on the page


class Ranked(NamedTuple):
    """A doubtful region of an image; the most doubtful sorts last, of equal ones the first in the dataset."""

    doubt: float
    later: tuple[int, int]  # minus the number of the image, minus that of the region
    image: str
    region: Region


def doubt(trainer: SegmentationTrainer, min_pixels: int) -> None:
    """Rank the doubtful regions of the evaluation data, and write `doubts.csv` and `index.html`.

    Processes share the images. At most `MOST` regions are kept, so that memory does not grow with their number.

    Args:
        trainer: model, protocol and data.
        min_pixels: smaller regions are left out.

    Raises:
        InputError: an image cannot be read.
    """
    journal, known, _ = open_journal(trainer, JOURNAL, {"min_pixels": min_pixels})
    model, first = prepare_model(trainer), trainer.is_world_process_zero()

    def predict(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = (_find(trainer, model, sample, min_pixels)[0] for sample in samples)
        return [{"id": sample["id"], "regions": regions} for sample, regions in zip(samples, found, strict=True)]

    kept: list[Ranked] = []
    batches = trainer.get_eval_dataloader()
    work = tqdm(work_of(batches, with_states=True), "doubt", len(batches), disable=None if first else True)
    for entry, _ in run(work, predict, journal, known):
        for values in entry.record["regions"]:
            region = Region(*values)
            ranked = Ranked(region.doubt, (-int(entry.key), -region.number), entry.record["id"], region)
            (heapq.heappush if len(kept) < MOST else heapq.heappushpop)(kept, ranked)
    parts = processes_of(trainer).gather(kept)
    found = heapq.nlargest(MOST, (ranked for part in parts for ranked in part))
    if first:
        write_atomic(trainer.output / "doubts.csv", doubts_table(trainer.spec, [each[2:] for each in found]))
        shown = [_outlined(trainer, model, ranked, min_pixels) for ranked in found[:SHOWN]]
        write_doubts_page(trainer.output, trainer.spec, len(trainer.eval_dataset), len(found), shown)
        logger.info("%d doubtful regions. Written: %s", len(found), trainer.output / "index.html")
    trainer.accelerator.wait_for_everyone()
    journal.close()
    if trainer.accelerator.is_local_main_process:
        journal.delete()


def _find(
    trainer: SegmentationTrainer, model: torch.nn.Module, sample: dict[str, Any], min_pixels: int
) -> tuple[list[Region], np.ndarray, np.ndarray]:
    """Regions, the number of the region of each pixel `(H, W)`, and the predicted ids `(H, W)`."""
    label, parts = sample["label"], []
    for top, ids, scores in trainer.label_scores(model, sample):
        given = label[top : top + len(ids)].to(scores.device).long()
        given = torch.where(given < trainer.spec.num_labels, given, 0)
        own, best = (scores.gather(0, each[None])[0] for each in (given, ids))
        parts.append([each.cpu().numpy() for each in (ids, own, best)])
    ids, own, best = (np.concatenate(each) for each in zip(*parts, strict=True))
    found = doubtful_regions(label.numpy(), ids, own, best, trainer.spec.num_labels, min_pixels)
    return *found, ids


def _outlined(trainer: SegmentationTrainer, model: torch.nn.Module, ranked: Ranked, min_pixels: int) -> Outlined:
    sample = trainer.eval_dataset[-ranked.later[0]]
    _, numbers, ids = _find(trainer, model, sample, min_pixels)
    mask = numbers == ranked.region.number
    return Outlined(
        ranked.image, ranked.region, outlined_row(sample["image"], sample["label"], ids, mask, trainer.spec.palette)
    )
