"""Training and evaluation by a recipe: schedules, groups, resumption, averaging, several processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback

import hf_denseseg
import processes
from hf_denseseg.cli import main
from hf_denseseg.data.segmentation import load_segmentation
from hf_denseseg.data.shards.packing import pack
from hf_denseseg.errors import InputError
from hf_denseseg.inference.settings import InferenceSettings
from hf_denseseg.training import run as training_run
from hf_denseseg.training.checkpoints import fault_of, last_complete_checkpoint, mark_complete
from hf_denseseg.training.ema import ExponentialMovingAverage
from hf_denseseg.training.optimization import load_class_weights, parameter_groups
from hf_denseseg.training.recipe import load_recipe
from hf_denseseg.training.run_folder import sole_run
from hf_denseseg.training.tasks.segmentation_trainer import SegmentationTrainer
from reference import REPOSITORY
from test_published_dsct import REDUCED as TINY

WORDS = [
    *("--config_overrides", json.dumps(TINY)),
    *("--dataset", "synthetic@64x96", "--max_train_samples", "24", "--max_eval_samples", "5"),
    *("--crop_size", "32", "48", "--per_device_train_batch_size", "4", "--learning_rate", "1.0e-3"),
    *("--use_cpu", "--eval_strategy", "no"),
]
TEN = ("--max_steps", "10", "--save_steps", "5", "--max_train_samples", "12", "--ema_decay", "0.9", "--channels_last")


def run(output, *words):
    return training_run.train(load_recipe(None, [*WORDS, "--output_dir", str(output), *words]))


def trainer_of(output, *words):
    recipe = load_recipe(None, [*WORDS, "--output_dir", str(output), *words])
    data = training_run.load_data(recipe, "train")
    model = training_run.build_model(recipe.model, data.spec)
    return training_run.build_trainer(recipe, model, data, data)


def weights(output):
    return load_file(Path(output) / "model" / "model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{len(different)} tensors differ, first {different[0]}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 4 steps, evaluated at the end."""
    output = tmp_path_factory.mktemp("finished")
    return output, run(output, "--max_steps", "4")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights of an uninterrupted run of 10 steps."""
    output = tmp_path_factory.mktemp("uninterrupted")
    run(output, *TEN)
    return weights(output)


def test_a_run_writes_model_images_page_and_card(finished):
    output, results = finished
    for name in ("recipe.yaml", "learning_curve.png", "images.png", "index.html", "results.json"):
        assert (output / name).stat().st_size > 0, name
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "labels.json", "README.md"):
        assert (output / "model" / name).stat().st_size > 0, name
    assert not list((output / "model").glob("*.bin")), "a model folder holds no pickle"
    assert json.loads((output / "results.json").read_text())["scores"]["mean_iou"] == results["scores"]["mean_iou"]
    page = (output / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)  # base64 of an image may contain it by chance


def test_card_is_parsed_by_the_hub_library(finished):
    from huggingface_hub import ModelCard

    output, results = finished
    found = ModelCard.load(output / "model" / "README.md").data.eval_results
    assert {result.metric_type: result.metric_value for result in found}["mean_iou"] == results["scores"]["mean_iou"]


def test_finished_run_is_not_trained_again(finished, monkeypatch):
    output, results = finished
    monkeypatch.setattr(training_run, "build_model", lambda *args: pytest.fail("trained again"))
    assert run(output, "--max_steps", "4")["scores"] == results["scores"]


def test_folder_of_another_run_is_refused(finished):
    with pytest.raises(InputError, match="holds another run, different in learning_rate"):
        run(finished[0], "--max_steps", "4", "--learning_rate", "2.0e-3")


def test_folder_in_which_another_process_trains_is_refused(tmp_path):
    other = f"""
import pathlib, sys
from hf_denseseg.training.run_folder import sole_run
with sole_run(pathlib.Path({str(tmp_path)!r}), process_index=0):
    print("training", flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", other]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "training\n"
        with pytest.raises(InputError, match="Another process is training in .* give another --output_dir"):
            run(tmp_path, "--max_steps", "4")
        process.kill()
    with sole_run(tmp_path, process_index=0):  # a killed run leaves the folder free
        assert not (tmp_path / "recipe.yaml").exists()


def test_evaluation_gives_the_scores_of_the_run_again(finished, tmp_path):
    output, results = finished
    data = ["--dataset", "synthetic@64x96", "--max_eval_samples", "5", "--use_cpu", "--output_dir", str(tmp_path)]
    assert main(["evaluate", str(output / "model"), *data]) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    one, two = (np.array(each["scores"]["confusion_matrix"]) for each in (again, results))
    # Pixels whose two best classes are equal except for rounding may differ: loaded weights lie at other addresses.
    assert abs(one - two).sum() <= 1e-3 * two.sum() > 0


def test_evaluation_uses_the_protocol_of_the_checkpoint_by_default(finished, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(finished[0] / "model", folder)
    InferenceSettings(mode="slide", crop_size=(48, 48), stride=(32, 32)).save(folder)
    words = ["evaluate", str(folder), "--dataset", "synthetic@64x96", "--max_eval_samples", "1", "--use_cpu"]
    modes = []
    for given in ([], ["--test_mode", "whole"]):
        assert main([*words, *given, "--output_dir", str(tmp_path / "out")]) == 0
        modes.append(json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]["mode"])
    assert modes == ["slide", "whole"]


def test_a_trained_model_learns_other_classes_from_a_folder(finished, tmp_path):
    """Fine-tuning on own data: the head for the new classes is initialized, the rest starts from the checkpoint."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / "data" / split / kind).mkdir(parents=True)
        for index in range(4):
            image = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / split / "images" / f"{index}.png")
            Image.fromarray(image[..., 0] % 3).save(tmp_path / "data" / split / "labels" / f"{index}.png")
    (tmp_path / "data" / "classes.json").write_text(json.dumps({"name": "own", "classes": ["a", "b", "c"]}))
    words = ["--model", str(finished[0] / "model"), "--dataset", str(tmp_path / "data"), "--max_steps", "1"]
    recipe = load_recipe(None, [*WORDS[2:], *words, "--output_dir", str(tmp_path / "run")])
    results = training_run.train(recipe)
    assert [row["class"] for row in results["scores"]["per_class"]] == ["a", "b", "c"]
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["id2label"] == {
        "0": "a", "1": "b", "2": "c"
    }  # fmt: skip


def test_results_name_versions_and_the_machine_and_the_pages_show_them(finished):
    output, results = finished
    assert results["versions"]["torch"] == torch.__version__
    found = results["machine"]
    assert (found["accelerator"], found["processes"], found["threads"]) == (None, 1, torch.get_num_threads())
    for page in (output / "index.html", output / "model" / "README.md"):
        assert f"torch {torch.__version__}" in page.read_text() and found["processor"] in page.read_text(), page


def test_killed_run_resumes_to_the_same_weights(uninterrupted, tmp_path):
    """10 steps equal 5, kill -9, and the rest, bit for bit: weights, averages, order, augmentation, dropout."""
    words = [*WORDS, *TEN, "--output_dir", str(tmp_path)]
    processes.kill_when_complete(processes.start(["train", *words]), tmp_path / "checkpoint-5")
    assert not (tmp_path / "results.json").exists()
    results = training_run.train(load_recipe(None, words))
    assert results["training"]["resumed_from_step"] == 5
    assert_same_weights(uninterrupted, weights(tmp_path))


def test_resume_within_an_epoch_skips_samples_already_used(uninterrupted, tmp_path):
    """Epochs have 3 steps, so step 5 lies in the second; a run stopped there continues with the same samples."""
    run(tmp_path, *TEN)
    (tmp_path / "results.json").unlink()
    (tmp_path / "checkpoint-10" / "complete.json").unlink()  # as if the last save had been interrupted
    run(tmp_path, *TEN)
    assert_same_weights(uninterrupted, weights(tmp_path))


def test_a_run_with_rare_classes_resumes_to_the_same_weights(uninterrupted, tmp_path, monkeypatch):
    words = (*TEN, "--class_balanced_sampling", "--copy_paste", "0.5")
    run(tmp_path, *words)
    whole = weights(tmp_path)
    assert any(not torch.equal(whole[name], uninterrupted[name]) for name in whole)  # the switches reach the training
    (tmp_path / "results.json").unlink()
    (tmp_path / "checkpoint-10" / "complete.json").unlink()
    monkeypatch.setattr("hf_denseseg.training.tasks.segmentation.count_pixels", None)  # counted once
    run(tmp_path, *words)
    assert_same_weights(whole, weights(tmp_path))


def test_incomplete_checkpoint_is_never_resumed(tmp_path):
    for step in (10, 20, 30):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(100))
        if step < 30:
            mark_complete(folder)
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(bytes(50))  # truncated later
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert fault_of(tmp_path / "checkpoint-10") is None
    assert not (tmp_path / "checkpoint-30").exists()


def test_two_processes_count_every_image_once(finished, tmp_path):
    """5 images of different sizes on 2 processes: the matrix of one process, exactly."""
    checkpoint = str(finished[0] / "model")
    words = ["--dataset", "synthetic", "--max_eval_samples", "5", "--use_cpu", "--output_dir"]
    assert main(["evaluate", checkpoint, *words, str(tmp_path / "one")]) == 0
    processes.run_two(["evaluate", checkpoint, *words, str(tmp_path / "two")], "29541", tmp_path)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["scores"] for name in ("one", "two"))
    assert two["confusion_matrix"] == one["confusion_matrix"]
    assert one["pixels"] == sum(map(sum, one["confusion_matrix"]))


@pytest.mark.slow
def test_torchrun_trains_with_the_loss_of_one_process(tmp_path):
    """The launcher itself; `test_distributed.py` compares weights."""
    # Each process draws its own dropout, so it is off.
    sizes = json.dumps(TINY | {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0})
    step = ["--config_overrides", sizes, "--max_steps", "1", "--logging_steps", "1", "--save_strategy", "no"]
    words = [*WORDS[2:], *step]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29542"]
    two = ["--per_device_train_batch_size", "2", "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(
        [*launch, str(REPOSITORY / "scripts" / "train.py"), *words, *two], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    training_run.train(load_recipe(None, [*words, "--output_dir", str(tmp_path / "one")]))
    histories = [json.loads((tmp_path / name / "results.json").read_text())["history"] for name in ("one", "two")]
    losses = [next(entry["loss"] for entry in history if "loss" in entry) for history in histories]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_trains_from_parquet_shards(tmp_path, streaming):
    for split, count in (("train", 6), ("validation", 2)):
        pack(load_segmentation("synthetic@64x96", split, limit=count), tmp_path / "shards", split)
    words = ("--max_steps", "2", "--dataset", str(tmp_path / "shards"), "--streaming", streaming)
    results = run(tmp_path / "run", *words)
    assert results["steps"] == 2 and results["images"] == 2


def test_polynomial_schedule_has_warmup_and_final_rate(tmp_path):
    schedule = ["--lr_scheduler_kwargs", "{power: 0.9, lr_end: 1.0e-4}", "--warmup_steps", "2", "--logging_steps", "1"]
    history = run(tmp_path, "--max_steps", "6", *schedule)["history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    expected = [0.0, 0.5e-3] + [(1e-3 - 1e-4) * (1 - step / 4) ** 0.9 + 1e-4 for step in range(4)]
    assert rates == pytest.approx(expected, rel=1e-6)


class RecordRates(TrainerCallback):
    """Records the learning rates of the encoder and the head at every step."""

    def __init__(self):
        self.encoder, self.head = [], []

    def on_step_begin(self, args, state, control, *, optimizer, **kwargs):
        for group in optimizer.param_groups:
            assert group["momentum"] == 0.9 and group["weight_decay"] == 0.0
            in_head = {name.startswith("decode_head.") for name in group["names"]}
            (self.head if in_head == {True} else self.encoder).append(group["lr"])


def test_head_starts_at_ten_times_the_rate_and_ends_at_the_same_rate(tmp_path):
    """SETR: SGD, `head` times 10, and `(base - min) * (1 - t / T) ** 0.9 + min` with one `min` for all groups."""
    words = ["--optim", "sgd", "--optim_args", "momentum=0.9", "--weight_decay", "0.0", "--learning_rate", "0.01"]
    rule = ["--head_learning_rate_multiplier", "10.0", "--lr_scheduler_kwargs", "{power: 0.9, lr_end: 1.0e-4}"]
    trainer = trainer_of(tmp_path, *words, *rule, "--max_steps", "5", "--save_strategy", "no")
    rates = RecordRates()
    trainer.add_callback(rates)
    trainer.train()
    assert rates.encoder == pytest.approx([(0.01 - 1e-4) * (1 - step / 5) ** 0.9 + 1e-4 for step in range(5)])
    assert rates.head == pytest.approx([(0.1 - 1e-4) * (1 - step / 5) ** 0.9 + 1e-4 for step in range(5)])
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([1e-4, 1e-4])


def test_final_rate_above_an_initial_rate_is_refused(tmp_path):
    rule = ["--layer_decay", "0.5", "--lr_scheduler_kwargs", "{power: 0.9, lr_end: 1.0e-4}"]
    with pytest.raises(InputError, match="lr_end is 0.0001, but a parameter group starts at the learning rate"):
        trainer_of(tmp_path, *rule, "--max_steps", "2").train()


def test_switches_of_the_recipe_reach_the_loss_and_the_precision(tmp_path):
    switches = ["--ohem_threshold", "0.7", "--ohem_min_kept", "10", "--loss_normalization", "all"]
    switches += ["--label_smoothing", "0.1", "--class_weights"]
    words = ["--max_steps", "1", "--bf16", "--gradient_accumulation_steps", "2", *switches, *(["1.0"] * 10), "2.0"]
    trainer, seen = trainer_of(tmp_path, *words), []
    trainer.model.decode_head.register_forward_hook(lambda module, args, logits: seen.append(logits.dtype))
    trainer.train()
    assert seen == [torch.bfloat16] * 2  # two batches accumulated
    options = trainer.model.loss_function.keywords
    assert (options["ohem_threshold"], options["ohem_min_kept"], options["normalization"]) == (0.7, 10, "all")
    assert options["label_smoothing"] == 0.1
    assert options["class_weights"].tolist() == [1.0] * 10 + [2.0]


@pytest.mark.parametrize("loss", ["focal", "lovasz", "ce+dice"])
def test_other_losses_reach_the_model(tmp_path, loss):
    trainer = trainer_of(tmp_path, "--max_steps", "1", "--loss", loss)
    trainer.train()
    assert trainer.model.loss_function.keywords["kind"] == loss


@pytest.mark.parametrize(
    "words, message",
    [
        (["--loss", "ce+dise"], "Did you mean 'ce\\+dice'"),
        (["--loss", "dice", "--ohem_threshold", "0.7"], "or use 'ce\\+dice'"),
        (["--loss", "lovasz", "--loss_normalization", "all"], "or use 'ce\\+lovasz'"),
        (["--loss", "focal", "--label_smoothing", "0.1"], "use a loss with 'ce'"),
        (["--label_smoothing", "1.5"], "from 0 up and below 1"),
    ],
)
def test_losses_that_cannot_be_followed_are_refused(tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, *words)


@pytest.mark.parametrize(
    "model, words, expected",
    [
        ("dsct-tiny-sac", [], "valid"),
        ("setr-naive-vit-base", [], "all"),
        ("setr-naive-vit-base", ["--loss_normalization", "valid"], "valid"),
    ],
)
def test_loss_normalization_is_the_models_own_by_default(tmp_path, model, words, expected):
    sizes = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 12}
    trainer = trainer_of(tmp_path, "--model", model, "--config_overrides", json.dumps(sizes), *words)
    assert trainer.model.loss_function.keywords["normalization"] == expected


HALF_RESNET18 = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 32, "depths": [2, 2, 2, 2]}
HALF_RESNET18 |= {"hidden_sizes": [32, 64, 128, 256], "out_features": ["stage1", "stage2", "stage3", "stage4"]}

MEMORIZED = {
    "dsct-tiny-sapp": (
        {"spatial_hidden_sizes": [32, 64, 96], "stem_channels": 32, "hidden_size": 48, "num_hidden_layers": 6}
        | {"num_attention_heads": 2, "decoder_hidden_size": 64, "sapp_hidden_size": 48}
        | {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0},
        ["--learning_rate", "8.0e-3", "--warmup_steps", "10", "--max_steps", "1000"],
    ),
    "setr-pup-vit-base": (
        {"image_size": 96, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
        | {"decoder_hidden_size": 64, "auxiliary_layers": [1, 3]},
        ["--learning_rate", "2.0e-3", "--warmup_steps", "50", "--max_steps", "1500"],
    ),
    "hfgd-resnet50-os2": (
        {"backbone_config": HALF_RESNET18, "decoder_width": 64, "merge_channels": 64, "cae_wide_channels": 128}
        | {"cae_channels": 64, "cae_qk_channels": 16, "batch_norm_momentum": 0.1},
        ["--learning_rate", "2.0e-3", "--warmup_steps", "20", "--max_steps", "600"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMORIZED)
def test_eight_images_are_memorized(tmp_path, name):
    """mIoU above 0.9 on the training images, thin poles and signs included; about 8 minutes on one core."""
    sizes, schedule = MEMORIZED[name]
    words = [
        *("--model", name, "--config_overrides", json.dumps(sizes), *schedule, "--channels_last"),
        *("--dataset", "synthetic@96x128", "--eval_split", "train", "--max_train_samples", "8"),
        *("--max_eval_samples", "8", "--crop_size", "96", "128", "--scale_range", "1.0", "1.0", "--flip", "false"),
        *("--cat_max_ratio", "1.0", "--photometric_distortion", "false"),
        *("--weight_decay", "0.0", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no"),
        *("--output_dir", str(tmp_path)),
    ]
    assert training_run.train(load_recipe(None, words))["scores"]["mean_iou"] > 0.9


def test_parameter_groups_separate_head_depth_and_decay():
    model = hf_denseseg.create_model("dsct-tiny-sac", **TINY)
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, head_multiplier=10.0, layer_decay=0.5)
    found = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["decode_head.classifier.weight"] == (10.0, 0.1)
    assert found["decode_head.classifier.bias"] == (10.0, 0.0)
    assert found["dsct.encoder.embeddings.cls_token"] == (0.5**7, 0.0)
    assert found["dsct.encoder.stem.convolution.weight"] == (0.5**7, 0.1)
    assert found["dsct.encoder.context.mlp.fc1.weight"] == (0.5**6, 0.1)
    assert found["dsct.encoder.blocks.0.context.mlp.fc1.weight"] == (0.5**5, 0.1)
    assert found["dsct.encoder.blocks.4.context.mlp.fc1.weight"] == (0.5**1, 0.1)
    assert found["dsct.encoder.layernorm.weight"] == (1.0, 0.0)


def test_parts_of_the_backbone_beside_the_encoder_learn_at_its_rate():
    """SETR-MLA: the aggregation belongs to the official backbone; only names with `head` learn ten times faster."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mla_layers": [0, 1, 2, 3]}
    with torch.device("meta"):
        model = hf_denseseg.create_model("setr-mla-vit-large", **sizes)
    for layer_decay in (None, 0.5):
        groups = parameter_groups(
            model, learning_rate=1.0, weight_decay=0.0, head_multiplier=10.0, layer_decay=layer_decay
        )
        rates = {}
        for group in groups:
            for name in group["names"]:
                rates.setdefault(name.partition(".")[0], set()).add(group["lr"])
        assert rates.pop("setr") == ({1.0} if layer_decay is None else {0.5**depth for depth in range(1, 6)})
        assert rates == {"aggregation": {1.0}, "decode_head": {10.0}, "auxiliary_head": {10.0}}


def test_layer_decay_needs_a_model_with_parameter_depths():
    with pytest.raises(InputError, match="Linear does not support layer_decay"):
        parameter_groups(torch.nn.Linear(2, 2), learning_rate=1.0, weight_decay=0.1, layer_decay=0.9)


def test_average_follows_its_equation(tmp_path):
    """`decay` grows to 0.75 in 26 updates; a run that was continued goes on with it."""
    model = torch.nn.Linear(2, 1, bias=False)
    average = ExponentialMovingAverage(0.75)
    average.start(model)
    expected = torch.zeros(1, 2)
    for step in range(40):
        model.weight.data = torch.full((1, 2), float(step % 7) ** 2)
        if step == 20:
            average.save(tmp_path / "ema.safetensors")
            average = ExponentialMovingAverage(0.75)
            average.start(torch.nn.Linear(2, 1, bias=False))
            average.load(tmp_path / "ema.safetensors")
        average.update(model)
        decay = min(0.75, (1 + step) / (10 + step)) if step else 0.0  # 0, 2/11, 3/12, 4/13, ...
        expected = decay * expected + (1 - decay) * model.weight.detach()
        with average.swapped_into(model):
            assert torch.allclose(model.weight, expected)
    assert torch.equal(model.weight, torch.full((1, 2), 16.0))


def test_a_short_average_holds_none_of_the_first_weights():
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data.fill_(1000.0)
    average = ExponentialMovingAverage(0.999)
    average.start(model)
    average.update(model)
    for _ in range(27):
        model.weight.data.fill_(1.0)
        average.update(model)
    with average.swapped_into(model):
        assert torch.allclose(model.weight, torch.ones(1, 2), atol=1e-3)


def test_a_decay_that_a_short_run_does_not_reach_is_told(caplog):
    averages = {}
    for decay in (0.9, 0.99, 0.999):
        model = torch.nn.Linear(2, 1, bias=False)
        averages[decay] = ExponentialMovingAverage(decay)
        averages[decay].start(model)
        for step in range(100):  # to (1 + 99) / (10 + 99) = 0.917
            model.weight.data.fill_(float(step % 7))
            averages[decay].update(model)
    caplog.set_level("WARNING", logger="hf_denseseg")
    averages[0.9].warn_if_not_reached(100)
    assert not caplog.records
    averages[0.99].warn_if_not_reached(100)
    assert "ema_decay 0.99 is not reached in 100 steps: it grows with them, here to 0.917, so that the" in caplog.text
    first, second, third = (average.average.module.weight for average in averages.values())
    assert torch.equal(second, third) and not torch.allclose(first, second)


def test_the_average_of_the_best_evaluation_is_scored_and_saved(tmp_path, monkeypatch):
    """Scores that fall from step to step: the average of the last step must not be kept."""
    compute = SegmentationTrainer.compute_scores
    falling = iter((0.9, 0.6, 0.3, 0.8))  # after 2, 4 and 6 steps, and of what is saved
    monkeypatch.setattr(
        SegmentationTrainer, "compute_scores", lambda self: compute(self) | {"mean_iou": next(falling)}
    )
    words = ("--max_steps", "6", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2", "--ema_decay")
    results = run(tmp_path, *words, "0.5", "--load_best_model_at_end")
    assert results["scores"]["mean_iou"] == 0.8
    best, last = (load_file(tmp_path / f"checkpoint-{step}" / "ema.safetensors") for step in (2, 6))
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, best[f"module.{name}"], atol=0, rtol=0)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_class_weights_come_from_the_statistics_file(tmp_path):
    file = tmp_path / "stats.json"
    file.write_text(json.dumps({"class_weights": {"enet": [1.0, 2.0]}}))
    assert load_class_weights(f"{file}:enet", 2).tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match="no weights 'median'"):
        load_class_weights(f"{file}:median", 2)
    with pytest.raises(InputError, match="2 weights for 3 classes"):
        load_class_weights(f"{file}:enet", 3)
    with pytest.raises(InputError, match="is not FILE:NAME"):
        load_class_weights("nowhere.json:enet", 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "dsct-huge-sac"], "Did you mean"),
        (["--config_overrides", "{hiden_size: 3}"], "hidden_size"),
        (["--config_overrides", "{hidden_size: 33}"], "heads do not divide"),
        (["--dataset", "nowhere/at/all"], "nowhere/at/all"),
        (["--ema_decay", "1.5"], "ema_decay is 1.5"),
        (["--encoder_weights", "nowhere.pth"], "nowhere.pth"),
        (["--copy_paste", "1.5"], "copy_paste is 1.5: give a probability"),
        (["--copy_paste", "0.5", "--streaming"], "which a stream cannot do"),
    ],
)
def test_wrong_input_ends_with_code_2_before_any_work(tmp_path, capsys, words, message):
    assert main(["train", *WORDS, "--max_steps", "2", "--output_dir", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_output_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["train", *WORDS, "--max_steps", "2", "--output_dir", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_full_disk_ends_with_code_1_and_no_partial_file(tmp_path, capsys, monkeypatch):
    import errno

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["train", *WORDS, "--max_steps", "2", "--output_dir", str(tmp_path)]) == 1
    assert "disk is full" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
