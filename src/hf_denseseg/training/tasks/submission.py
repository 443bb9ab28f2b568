"""Predict a split for an evaluation server; predictions of an interrupted run are kept."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from hf_denseseg.evaluation.submission import Server, check_images, encode_prediction, pack_submission
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.predict.runner import run
from hf_denseseg.training.evaluation import open_journal, processes_of, work_of
from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer

logger = logging.getLogger(__name__)

PREDICTIONS = "submission"
JOURNAL = "submission_journal"


def submit(trainer: SegmentationTrainer, server: Server, path: Path) -> None:
    """Segment every image of the evaluation data by the test protocol, and write the zip for the server.

    Predictions are collected in the folder `submission` of the output folder until the zip is written. Several
    processes share the images; they need one output folder.

    Args:
        trainer: model, protocol and data.
        server: see `server_for`.
        path: zip file.

    Raises:
        InputError: the data cannot be submitted to this server, or an image cannot be read.
        RunError: the server would refuse the predictions; no zip is written.
    """
    check_images(server, image_names(trainer.eval_dataset.data.dataset))
    folder = trainer.output / PREDICTIONS
    journal, known, kept = open_journal(trainer, JOURNAL)
    if trainer.accelerator.is_local_main_process and not kept:  # files of another checkpoint or protocol
        shutil.rmtree(folder, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()

    def file_of(record: dict[str, Any]) -> Path:
        return folder / f"{record['id']}{server.ending}"

    def predict(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        records = []
        for sample in samples:
            ids = trainer.predict_labels(sample)
            records.append({"id": sample["id"], "size": list(ids.shape)})
            write_atomic(file_of(records[-1]), encode_prediction(server, ids.numpy().astype(np.uint8)))
        return records

    work = work_of(trainer.get_eval_dataloader(), with_states=True)
    entries = run(work, predict, journal, known, lambda record: file_of(record).exists())
    sizes = {entry.record["id"]: tuple(entry.record["size"]) for entry, _ in entries}
    sizes = {name: size for part in processes_of(trainer).gather(sizes) for name, size in part.items()}
    trainer.accelerator.wait_for_everyone()  # until all files are written
    journal.close()
    if trainer.is_world_process_zero():
        pack_submission(folder, path, server.benchmark, sizes)
        shutil.rmtree(folder)
        journal.delete()
        logger.info("Written: %s, predictions for %d images, for %s.", path, len(sizes), server.title)


def image_names(rows: Any) -> list[str]:
    """Ids of all images of a dataset, without reading the images."""
    return list(rows.with_format(None)["id"]) if hasattr(rows, "with_format") else list(rows.rows["id"])
