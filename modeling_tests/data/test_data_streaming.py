"""Streams for training: the shards of each process and worker, the order, and resuming after an interruption."""

import json
import os
import random
import shutil
import sys
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import processes
from hf_denseseg.cli import main
from hf_denseseg.data.augmentation.classification import TrainImages, training_transform
from hf_denseseg.data.augmentation.segmentation import TrainAugmentation, TrainDataset
from hf_denseseg.data.classification import load_classification
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.shards.packed_rows import PackedRows
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.data.shards.streaming import StreamingTrainDataset
from hf_denseseg.data.synthetic.scenes import SYNTHETIC_SPEC
from hf_denseseg.errors import InputError
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from test_published_dsct import REDUCED as TINY

FORMS = pytest.mark.parametrize("form", ["parquet", "webdataset"])
ROWS, PER_SHARD = 22, 3  # 8 shards, the last of one row
CLASSIFICATION = "image-classification"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` in the folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """The same scenes packed in both forms."""
    folder = tmp_path_factory.mktemp("shards")
    for form in ("parquet", "webdataset"):
        source = load_segmentation(f"synthetic:{ROWS}@40x56", "train")
        pack(source, folder / form, "train", form=form, rows_per_shard=PER_SHARD)
        pack(load_segmentation("synthetic@40x56", "val", limit=2), folder / form, "validation", form=form)
    return folder


def stream_of(folder, rank=0, world=1, batch_size=2, **options):
    data = load_segmentation(folder, "train", streaming=True, **options)
    stream = StreamingTrainDataset(TrainDataset(data, TrainAugmentation((32, 32)), seed=5), seed=5)
    stream.set_process(rank, world, batch_size)
    return stream


class Recorded:
    """Stub of a training set: a sample is (epoch, number of the row, id)."""

    def __init__(self, data):
        self.data = data

    def sample(self, row, epoch, index):
        return epoch, index, row["id"]


def recorded(folder, count, rank=0, world=1, seed=5, workers=0, first_batch=0):
    """The first samples of a process as (epoch, number of the row, id)."""
    data = load_segmentation(folder, "train", streaming=True)
    stream = StreamingTrainDataset(Recorded(data), seed=seed)
    stream.set_process(rank, world, 2)
    stream.first_batch = first_batch
    loader = DataLoader(stream, batch_size=2, num_workers=workers, collate_fn=list)
    return [sample for batch in islice(loader, -(-count // 2)) for sample in batch][:count]


def rows_of_ranks(world):
    """Number of rows of each process, counted by hand: shard k belongs to process k mod world."""
    sizes = [PER_SHARD] * (ROWS // PER_SHARD) + [ROWS % PER_SHARD]
    return [sum(sizes[rank::world]) for rank in range(world)]


@FORMS
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_together_see_every_row_once_in_every_epoch(shards, form, world):
    ids = {row["id"] for row in load_segmentation(shards / form, "train").dataset}
    assert len(ids) == ROWS
    for epoch in (0, 1):
        seen = []
        for rank, count in enumerate(rows_of_ranks(world)):
            found = recorded(shards / form, 2 * count, rank, world)[epoch * count : (epoch + 1) * count]
            assert {each[0] for each in found} == {epoch}
            seen += [each[2] for each in found]
        assert sorted(seen) == sorted(ids)


@FORMS
def test_a_process_reads_its_own_shards_only(shards, form, tmp_path):
    """The shards of the other process are deleted after the size check; reading still works."""
    names = [path.name for path in sorted((shards / form).glob("train-*"))]
    for rank, count in enumerate(rows_of_ranks(2)):
        folder = shutil.copytree(shards / form, tmp_path / str(rank))
        stream = StreamingTrainDataset(Recorded(load_segmentation(folder, "train", streaming=True)))
        stream.set_process(rank, 2, 2)
        for name in names[1 - rank :: 2]:
            (folder / name).unlink()
        assert len({each[2] for each in islice(stream, 3 * count)}) == count
        (folder / names[rank]).unlink()
        with pytest.raises(InputError, match="is damaged"):
            list(islice(stream, count))


@FORMS
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_samples_do_not_depend_on_the_number_of_workers(shards, form, workers):
    assert recorded(shards / form, 60, workers=workers) == recorded(shards / form, 60)


def test_a_sample_is_that_of_the_indexed_rows(shards):
    """(seed, epoch, number of the row) determine it, in a stream as elsewhere."""
    indexed = TrainDataset(load_segmentation(shards / "parquet", "train"), TrainAugmentation((32, 32)), seed=5)
    order = recorded(shards / "parquet", 30)
    for (epoch, index, _), sample in zip(order, stream_of(shards / "parquet"), strict=False):
        expected = indexed[epoch, index]
        assert all(torch.equal(sample[key], expected[key]) for key in ("pixel_values", "labels"))


@FORMS
def test_order_follows_seed_epoch_and_process(shards, form):
    first = recorded(shards / form, 2 * ROWS)
    orders = [
        [each[1] for each in part] for part in (first[:ROWS], first[ROWS:], recorded(shards / form, ROWS, seed=6))
    ]
    assert first == recorded(shards / form, 2 * ROWS)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != sorted(orders[0])


@FORMS
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("first_batch", [3, 17])  # 22 rows, 11 batches an epoch: within the first and the second
def test_a_stream_resumes_at_any_batch(shards, form, workers, first_batch):
    uninterrupted = recorded(shards / form, 60)
    rest = recorded(shards / form, 60 - 2 * first_batch, workers=workers, first_batch=first_batch)
    assert rest == uninterrupted[2 * first_batch :]


def test_earlier_rows_are_not_read_again(shards, monkeypatch):
    data = load_segmentation(shards / "parquet", "train", streaming=True)
    read, original = [], PackedRows.read
    monkeypatch.setattr(PackedRows, "read", lambda *args: (read.append(list(args[2])), original(*args))[1])
    stream = StreamingTrainDataset(Recorded(data))
    stream.set_process(0, 1, 2)
    stream.first_batch = 1000
    next(iter(stream))
    assert len(read) <= ROWS // PER_SHARD + 1, "one epoch at most is touched"


def test_fewer_shards_than_processes_are_refused_with_the_fix(shards):
    with pytest.raises(InputError, match=r"has 8 shards of 'train' for 9 processes.* --rows_per_shard 1`"):
        stream_of(shards / "parquet", world=9)


@FORMS
def test_a_limit_keeps_the_first_rows(shards, form):
    rows = [row["id"] for row in load_segmentation(shards / form, "train").dataset]
    assert [row["id"] for row in load_segmentation(shards / form, "train", streaming=True, limit=7).dataset] == rows[
        :7
    ]
    data = load_segmentation(shards / form, "train", streaming=True, limit=7)
    stream = StreamingTrainDataset(Recorded(data))
    stream.set_process(0, 1, 2)
    assert {each[2] for each in islice(stream, 14)} == set(rows[:7])


@FORMS
def test_a_shard_that_breaks_while_it_is_read_is_named(tmp_path, form):
    pack(load_segmentation("synthetic:5@32x48", "train"), tmp_path, "train", form=form, rows_per_shard=5)
    data = load_segmentation(tmp_path, "train", streaming=True)  # sizes are compared here
    shard = next(tmp_path.glob("train-0*"))
    content = bytearray(shard.read_bytes())
    if form == "parquet":
        content[len(content) // 2] ^= 1
    else:
        member = bytes(content).index(b"label.png", 3000) // 512 * 512
        content[member : member + 400] = bytes(400)  # looks like the end of the archive
    shard.write_bytes(content)
    with pytest.raises(InputError, match=rf"{shard.name} is damaged .*rows are lost. Run `denseseg data pack` again"):
        list(data.dataset)


@FORMS
def test_random_damage_is_refused_or_does_no_harm(tmp_path, form):
    """Damage never leads to fewer rows, other rows, or another kind of error."""
    pack(load_segmentation("synthetic:4@16x24", "train"), tmp_path, "train", form=form, rows_per_shard=4)
    shard = next(tmp_path.glob("train-0*"))
    content, draw = shard.read_bytes(), random.Random(0)

    def rows():
        stream = load_segmentation(tmp_path, "train", streaming=True).dataset
        return [(row["id"], row["image"].tobytes(), row["label"].tobytes()) for row in stream]

    intact, refused = rows(), 0
    for _ in range(40):
        damaged, place = bytearray(content), draw.randrange(len(content) - 64)
        damaged[place : place + 64] = draw.randbytes(64)
        shard.write_bytes(damaged)
        try:
            assert rows() == intact
        except InputError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "change", [{"rows": 5}, {"rows_per_shard": 0}, {"shards": 3}, {"format_version": 9}, {"x": 1}]
)
def test_a_manifest_that_cannot_be_true_is_refused(tmp_path, change):
    pack(load_segmentation("synthetic:4@16x24", "train"), tmp_path, "train", rows_per_shard=2)
    path = tmp_path / "train.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        InputError, match="is damaged .* Delete it and pack|has format version 9, supported is 1|was not finished"
    ):
        load_segmentation(tmp_path, "train")


def test_shards_of_another_task_are_refused(tmp_path):
    pack(load_classification("synthetic:4@16x24", "train"), tmp_path, "train", task=CLASSIFICATION)
    for streaming in (False, True):
        with pytest.raises(InputError, match="packed for image-classification. Pack the data with `--task semantic-"):
            load_segmentation(tmp_path, "train", spec=SYNTHETIC_SPEC, streaming=streaming)


def test_the_embedded_stream_gives_every_pair_once_an_epoch():
    stream = load_segmentation("synthetic:6@40x56", "train", streaming=True)
    names = sorted(row["id"] for row in stream.dataset)
    for workers in (0, 2):
        endless = StreamingTrainDataset(Recorded(stream))
        endless.set_process(0, 1, 1)
        found = list(islice(DataLoader(endless, batch_size=None, num_workers=workers), 12))
        assert sorted(each[2] for each in found[:6]) == sorted(each[2] for each in found[6:]) == names
        assert [each[2] for each in found[:6]] != [each[2] for each in found[6:]]


WORDS = [
    *("--config_overrides", json.dumps(TINY), "--streaming", "true", "--use_cpu", "--eval_strategy", "no"),
    *("--crop_size", "32", "48", "--per_device_train_batch_size", "2", "--learning_rate", "1.0e-3"),
    *("--max_steps", "8", "--save_steps", "4", "--gradient_accumulation_steps", "2", "--max_eval_samples", "1"),
]


def train(output, data, *words):
    return training_run.train(load_recipe(None, [*WORDS, "--dataset", str(data), "--output_dir", str(output), *words]))


def assert_same_weights(first, second):
    one, two = (load_file(output / "model" / "model.safetensors") for output in (first, second))
    assert one.keys() == two.keys()
    assert not [name for name in one if not torch.equal(one[name], two[name])]


def test_a_resumed_run_takes_the_same_samples(shards, tmp_path):
    """Dropout included: random draws of the loader must not affect it. 8 steps of 2 x 2 rows are 1.5 epochs."""
    results = train(tmp_path / "uninterrupted", shards / "parquet", "--dataloader_num_workers", "0")
    assert results["steps"] == 8 and 0 <= results["training"]["data_wait_fraction"] <= 1
    train(tmp_path / "resumed", shards / "parquet", "--dataloader_num_workers", "2")
    (tmp_path / "resumed/results.json").unlink()
    (tmp_path / "resumed/checkpoint-8/complete.json").unlink()  # as if the last save had been interrupted
    again = train(tmp_path / "resumed", shards / "parquet", "--dataloader_num_workers", "2")
    assert again["training"]["resumed_from_step"] == 4
    assert_same_weights(tmp_path / "uninterrupted", tmp_path / "resumed")


def note_opened_shards(log):
    """Record in a file the name of every shard that this process or its workers open."""

    def note(event, arguments):
        if event == "open" and "train-" in str(arguments[0]) and str(arguments[0]).endswith(".tar"):
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, f"{os.path.basename(arguments[0])}\n".encode())
            os.close(handle)

    sys.addaudithook(note)


def train_rank(words, rank, port, log):
    """Run `denseseg train` as one of two processes."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    note_opened_shards(log)
    with Path(f"{log}.txt").open("w") as report:
        sys.stdout = sys.stderr = report
        code = main(["train", *words])
    os._exit(code)


@pytest.mark.slow
def test_two_processes_train_on_shards_of_their_own_and_resume_after_kill(shards, tmp_path):
    """Every process and worker records the files it opens: the two sets are disjoint and together complete."""
    words = [*WORDS, "--dataset", str(shards / "webdataset"), "--dataloader_num_workers", "2", "--max_steps", "16"]

    def start(name, port):
        words_of_run = [*words, "--output_dir", str(tmp_path / name)]
        logs = [str(tmp_path / f"{name}-rank{rank}") for rank in (0, 1)]
        ranks = [
            processes.CONTEXT.Process(target=train_rank, args=(words_of_run, rank, port, log))
            for rank, log in enumerate(logs)
        ]
        for process in ranks:
            process.start()
        return ranks, logs

    ranks, logs = start("uninterrupted", "29571")
    for process in ranks:
        process.join(400)
    assert [process.exitcode for process in ranks] == [0, 0], [Path(f"{log}.txt").read_text()[-2000:] for log in logs]
    names = [path.name for path in sorted((shards / "webdataset").glob("train-*"))]
    assert [set(Path(log).read_text().split()) for log in logs] == [set(names[0::2]), set(names[1::2])]

    ranks, _ = start("killed", "29572")
    processes.kill_when_complete(ranks[0], tmp_path / "killed/checkpoint-4")
    ranks[1].kill()
    ranks[1].join()
    ranks, logs = start("killed", "29573")
    for process in ranks:
        process.join(400)
    assert [process.exitcode for process in ranks] == [0, 0], [Path(f"{log}.txt").read_text()[-2000:] for log in logs]
    assert json.loads((tmp_path / "killed/results.json").read_text())["training"]["resumed_from_step"] >= 4
    assert_same_weights(tmp_path / "uninterrupted", tmp_path / "killed")


def test_images_with_classes_stream_too(tmp_path):
    """The batches of a stream are those of the indexed rows, whatever the number of workers."""
    pack(load_classification("synthetic:9@32x32", "train"), tmp_path, "train", rows_per_shard=4, task=CLASSIFICATION)
    transform = training_transform([24, 24], mean=[0.5] * 3, std=[0.5] * 3)
    indexed = TrainImages(load_classification(tmp_path, "train"), transform, seed=3)
    stream = StreamingTrainDataset(
        TrainImages(load_classification(tmp_path, "train", streaming=True), transform, seed=3), seed=3
    )
    stream.set_process(0, 1, 3)
    for sample in islice(stream, 20):
        expected = indexed[sample["epoch"], sample["index"]]
        assert sample["label"] == expected["label"] and torch.equal(sample["pixel_values"], expected["pixel_values"])
    with pytest.raises(InputError, match="streaming reads shards.*Pack the data: `denseseg data pack"):
        load_classification("synthetic:9@32x32", "train", streaming=True)
