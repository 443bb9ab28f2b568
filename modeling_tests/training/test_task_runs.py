"""Classification, detection and instance segmentation by a recipe: output of a run, resumption, processes."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import processes
from detection_model_tester import few_regions
from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.models.auto.pretrained import load_trained_model, task_of_checkpoint
from hf_denseseg.training import run as training_run
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.tasks.classification import ClassificationTrainer
from hf_denseseg.training.tasks.detection import DetectionTrainer
from test_published_hlg import REDUCED

COMMON = [
    *("--config_overrides", json.dumps(REDUCED), "--per_device_train_batch_size", "2", "--max_steps", "6"),
    *("--save_steps", "3", "--use_cpu", "--eval_strategy", "no", "--learning_rate", "1.0e-3", "--warmup_steps", "2"),
]
CLASSIFY = [
    *("--task", "image-classification", "--model", "hlg-tiny", *COMMON, "--dataset", "synthetic:10@40x48"),
    *("--max_eval_samples", "5", "--crop_size", "32", "32", "--auto_augment", "rand-m9-mstd0.5-inc1"),
    *("--random_erasing", "0.25", "--mixup", "0.8", "--cutmix", "1.0", "--label_smoothing", "0.1"),
    *("--ema_decay", "0.9", "--max_grad_norm", "5.0", "--lr_scheduler_type", "cosine"),
    *("--lr_scheduler_kwargs", "{lr_end: 1.0e-5, warmup_start: 1.0e-6}"),
]
SIZES = ["--shortest_edge", "64", "80", "--longest_edge", "128", "--test_base_size", "64", "128"]
DETECT = [
    *("--task", "object-detection", "--model", "hlg-retinanet-tiny", *COMMON, "--dataset", "synthetic:10@96x128"),
    *("--max_eval_samples", "3", "--no_decay_names", "norm", *SIZES, "--lr_scheduler_type", "constant"),
    *("--lr_scheduler_kwargs", "{drop_at: [0.7, 0.9], factor: 0.1, warmup_start: 1.0e-7}"),
]
INSTANCES = [
    *("--task", "instance-segmentation", "--model", "hlg-maskrcnn-tiny", *COMMON, *SIZES, "--max_steps", "1"),
    *("--dataset", "synthetic:4@96x128", "--eval_split", "train", "--max_eval_samples", "1"),
]
RUNS = {"image-classification": CLASSIFY, "object-detection": DETECT, "instance-segmentation": INSTANCES}
MAIN = {"image-classification": "top1", "object-detection": "box_ap", "instance-segmentation": "mask_ap"}
RESUMED = ("image-classification", "object-detection")


@pytest.fixture(scope="module", autouse=True)
def quick_runs():
    with pytest.MonkeyPatch.context() as patch:
        few_regions(patch)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and results of a finished, uninterrupted run of each task."""
    done = {}

    def run(task):
        if task not in done:
            output = tmp_path_factory.mktemp(task)
            done[task] = output, training_run.train(load_recipe(None, [*RUNS[task], "--output_dir", str(output)]))
        return done[task]

    return run


@pytest.mark.parametrize("task", RUNS)
def test_a_run_writes_model_images_page_and_a_card_that_the_hub_parses(finished, task):
    output, results = finished(task)
    assert results["task"] == task and results["steps"] == (1 if task == "instance-segmentation" else 6)
    for name in ("learning_curve.png", "images.png", "index.html", "results.json", "model/preprocessor_config.json"):
        assert (output / name).stat().st_size > 0, name
    assert json.loads((output / "results.json").read_text())["scores"] == json.loads(json.dumps(results["scores"]))
    card = ModelCard.load(output / "model" / "README.md")
    task_types = {found.task_type for found in card.data.eval_results}
    assert task_types == {"image-segmentation" if task == "instance-segmentation" else task}
    assert "| metric | published % | measured % |" in card.text
    assert task_of_checkpoint(str(output / "model")) == task
    classes = [row["class"] for row in results["scores"]["per_class"]]
    config = json.loads((output / "model" / "config.json").read_text())
    assert list(config["id2label"].values()) == classes


@pytest.mark.parametrize("task", RUNS)
def test_evaluation_infers_the_task_and_gives_the_scores_again(finished, task, tmp_path):
    output, results = finished(task)
    words = RUNS[task]
    data = words[words.index("--dataset") :][: 2 if task != "instance-segmentation" else 4]
    count = words[words.index("--max_eval_samples") + 1]
    words = ["evaluate", str(output / "model"), *data, "--max_eval_samples", count, "--use_cpu"]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["scores"][MAIN[task]] == pytest.approx(results["scores"][MAIN[task]], abs=1e-6)
    assert again["scores"]["per_class"] == [pytest.approx(row, abs=1e-6) for row in results["scores"]["per_class"]]
    assert again["protocol"] == json.loads(json.dumps(results["protocol"]))


@pytest.mark.parametrize("task", RESUMED)
def test_killed_run_resumes_to_the_same_weights(finished, task, tmp_path):
    """6 steps equal 3, kill -9, and the rest, bit for bit: weights, order, augmentation, mixing, sampling."""
    words = [*RUNS[task], "--output_dir", str(tmp_path)]
    processes.kill_when_complete(processes.start(["train", *words]), tmp_path / "checkpoint-3")
    assert not (tmp_path / "results.json").exists()
    results = training_run.train(load_recipe(None, words))
    assert results["training"]["resumed_from_step"] == 3
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (finished(task)[0], tmp_path))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys() and not different, different[:3]


@pytest.mark.parametrize(("task", "port"), [("image-classification", "29551"), ("object-detection", "29552")])
def test_two_processes_score_every_image_once(finished, task, port, tmp_path):
    """An odd number of images on 2 processes: the scores of one process, exactly."""
    checkpoint = str(finished(task)[0] / "model")
    words = ["--dataset", "synthetic:25@96x128", "--max_eval_samples", "5", "--use_cpu", "--output_dir"]
    assert main(["evaluate", checkpoint, *words, str(tmp_path / "one")]) == 0
    processes.run_two(["evaluate", checkpoint, *words, str(tmp_path / "two")], port, tmp_path)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in ("one", "two"))
    assert one == two
    counted = "images" if task == "image-classification" else "objects"
    assert one[counted] == sum(row[counted] for row in one["per_class"]) > 0


@pytest.mark.parametrize("task", RESUMED)
def test_interrupted_evaluation_predicts_no_image_again(finished, task, tmp_path, monkeypatch):
    """Interrupted at the third of 5 images, then when all are predicted and nothing is written yet."""
    trainer_class = {"image-classification": ClassificationTrainer, "object-detection": DetectionTrainer}[task]
    predicted, predict = [], trainer_class.predict_samples

    def counting(self, model, samples):
        if len(predicted) == 2:
            predicted.append("interrupted")
            raise KeyboardInterrupt
        predicted.extend(sample["index"] for sample in samples)
        return predict(self, model, samples)

    def interrupted(*args):
        raise KeyboardInterrupt

    words = ["evaluate", str(finished(task)[0] / "model"), "--dataset", "synthetic:25@96x128", "--use_cpu"]
    words += ["--max_eval_samples", "5", "--output_dir"]
    assert main([*words, str(tmp_path / "uninterrupted")]) == 0
    monkeypatch.setattr(trainer_class, "predict_samples", counting)
    output = tmp_path / "interrupted"
    assert main([*words, str(output)]) == 1
    with monkeypatch.context() as patch:
        patch.setattr(training_run, "_results", interrupted)
        assert main([*words, str(output)]) == 1
    assert predicted == [0, 1, "interrupted", 2, 3, 4] and not (output / "results.json").exists()
    assert main([*words, str(output)]) == 0
    assert len(predicted) == 6 and not (output / "evaluation_journal").exists()
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("uninterrupted", "interrupted")]
    assert results[0]["scores"] == results[1]["scores"]


def test_better_of_trained_and_averaged_weights_is_reported_and_saved(finished):
    output, results = finished("image-classification")
    scores = results["scores"]
    assert (
        scores["top1"] == max(scores["top1_averaged"], scores["top1_trained"]) == scores[f"top1_{scores['weights']}"]
    )
    text = (output / "model" / "README.md").read_text()
    assert "| top-1 accuracy, averaged weights |" in text and "| top-1 accuracy, trained weights |" in text
    saved = load_file(output / "model" / "model.safetensors")
    trained = load_file(output / "checkpoint-6" / "model.safetensors")
    averaged = {
        name.removeprefix("module."): value
        for name, value in load_file(output / "checkpoint-6" / "ema.safetensors").items()
    }
    expected = trained if scores["weights"] == "trained" else averaged
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())


def test_padding_is_0_after_normalization(tmp_path):
    recipe = load_recipe(None, [*DETECT, "--output_dir", str(tmp_path)])
    data = training_run.load_data(recipe, "train")
    trainer = training_run.build_trainer(recipe, training_run.build_model(recipe.model, data.spec), data, data)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    pixels, mask = batch["pixel_values"], batch["pixel_mask"][:, None].bool()
    assert pixels.shape[-1] % 32 == pixels.shape[-2] % 32 == 0 and pixels.dtype == torch.float32
    assert (pixels.masked_select(~mask) == 0).all() and pixels.masked_select(mask).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--task", "object-detection", "--mixup", "0.8"],
            "mixup .alpha of Mixup; 0: off. has no meaning in the task",
        ),
        (["--task", "image-classification", "--test_mode", "slide"], "test_mode .* belongs to semantic-segmentation"),
        (["--shortest_edge", "640"], "shortest_edge .* belongs to object-detection and instance-segmentation"),
        (["--task", "image-clasification"], "Unknown task 'image-clasification'. Did you mean 'image-classification'"),
    ],
)
def test_key_of_another_task_is_refused_with_the_reason(words, message):
    with pytest.raises(InputError, match=message):
        load_recipe(None, words)


def test_model_for_another_task_is_refused(finished, tmp_path):
    words = [*CLASSIFY, "--model", "hlg-retinanet-tiny", "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match="hlg-retinanet-tiny is a model for the task object-detection"):
        training_run.train(load_recipe(None, words))
    checkpoint = str(finished("image-classification")[0] / "model")
    with pytest.raises(InputError, match="saved by another kind of model"):
        load_trained_model(checkpoint, "object-detection")


def test_schedule_refuses_an_unknown_key(tmp_path):
    words = [
        *DETECT,
        "--lr_scheduler_kwargs",
        "{drop_at: 0.5, factor: 0.1, power: 2.0}",
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(InputError, match="lr_scheduler_kwargs .* of the schedule constant: .*power"):
        training_run.train(load_recipe(None, words))


LEARNED = {
    "image-classification": ("top1", 0.5),
    "object-detection": ("box_ap", 0.3),
    "instance-segmentation": ("mask_ap", 0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", LEARNED)
def test_demo_of_the_task_learns(task, tmp_path):
    """Classes of unseen images (chance 0.15), and objects of training images; minutes each on one core."""
    words = ["demo", "--task", task, "--output_dir", str(tmp_path), "--use_cpu", "--eval_strategy", "no"]
    assert main(words) == 0
    key, minimum = LEARNED[task]
    assert json.loads((tmp_path / "results.json").read_text())["scores"][key] > minimum
