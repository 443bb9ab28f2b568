"""Answer a split for an evaluation server; what an interrupted run has answered is kept."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_denseseg.evaluation.submission import Server, check_pictures, encode_answer, pack_submission
from hf_denseseg.files import write_atomic
from hf_denseseg.inference.predict.journal import Journal, Record, content_check
from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer

logger = logging.getLogger(__name__)

ANSWERS = "submission"
JOURNAL = "submission_journal"


def submit(trainer: SegmentationTrainer, server: Server, path: Path) -> None:
    """Segment every picture of the evaluation data by the test protocol and write the zip for the server.

    Answers are collected in the folder `submission` of the output folder until the zip is written. Several processes
    share the pictures; they need one output folder.

    Args:
        trainer: model, protocol and data.
        server: see `server_for`.
        path: zip file.

    Raises:
        InputError: the data cannot be submitted to this server, or a picture cannot be read.
        RunError: the answers are not what the server wants; no zip is written.
    """
    from accelerate.utils import gather_object

    check_pictures(server, picture_names(trainer.eval_dataset.data.dataset))
    answers = trainer.output / ANSWERS
    journal = Journal(trainer.output / JOURNAL, trainer.journal_key(), trainer.args.process_index)
    if trainer.accelerator.is_local_main_process and not journal.settle():
        shutil.rmtree(answers, ignore_errors=True)
    found = trainer.counted_before(journal)
    done = {record.number: record for record in found if (answers / f"{record.id}{server.ending}").exists()}
    sizes = {record.id: (record.amounts[0], record.amounts[1]) for record in done.values()}
    left = [number for number in range(len(trainer.eval_dataset)) if number not in done]
    share = left[trainer.args.process_index :: trainer.args.world_size]
    for number in tqdm(share, desc="images", disable=trainer.args.disable_tqdm):
        sample: dict[str, Any] = trainer.eval_dataset[number]
        answer = trainer.answer(sample)
        write_atomic(
            answers / f"{sample['id']}{server.ending}", encode_answer(server, answer.numpy().astype(np.uint8))
        )
        # The size is what the validation needs of a picture that is not read again.
        journal.add(Record.of(number, sample["id"], content_check(sample), torch.tensor(answer.shape)))
        sizes[sample["id"]] = (answer.shape[0], answer.shape[1])
    sizes |= dict(gather_object(list(sizes.items())))
    trainer.accelerator.wait_for_everyone()
    journal.close()
    if trainer.is_world_process_zero():
        pack_submission(answers, path, server.benchmark, sizes)
        shutil.rmtree(answers)
        journal.delete()
        logger.info("Written: %s, %d answers for %s.", path, len(sizes), server.title)


def picture_names(rows: Any) -> list[str]:
    """Ids of all pictures of a data set, none of them read."""
    return list(rows.with_format(None)["id"]) if hasattr(rows, "with_format") else list(rows.rows["id"])
