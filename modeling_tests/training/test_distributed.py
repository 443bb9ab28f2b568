"""Several processes and accumulated batches train the weights of one large batch; FSDP trains, saves and resumes."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hf_denseseg
import processes
from hf_denseseg.cli import main
from hf_denseseg.errors import InputError
from hf_denseseg.training import run as training_run
from hf_denseseg.training.distributed import prepare_fsdp
from hf_denseseg.training.recipe import load_recipe
from reference import REPOSITORY
from test_published_dsct import REDUCED

CONFIGURATIONS = sorted((REPOSITORY / "scripts" / "accelerate").glob("*.yaml"))
SIZES = REDUCED | {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
WORDS = [
    *("train", "--config_overrides", json.dumps(SIZES), "--dataset", "synthetic@64x96", "--max_train_samples", "20"),
    *("--max_eval_samples", "3", "--crop_size", "32", "48", "--learning_rate", "0.1", "--max_steps", "3"),
    *(
        "--use_cpu",
        "--eval_strategy",
        "no",
        "--optim",
        "sgd",
        "--optim_args",
        "momentum=0.9",
        "--logging_steps",
        "1",
        "--dataloader_drop_last",
    ),
]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
SHARDED |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def trained(folder):
    weights = load_file(folder / "model" / "model.safetensors")
    history = json.loads((folder / "results.json").read_text())["history"]
    return weights, [entry["loss"] for entry in history if "loss" in entry]


def furthest(first, second):
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.fixture(scope="module")
def large_batch(tmp_path_factory):
    """Three steps of 8 images in one process; an epoch drops 4 of 20 images."""
    folder = tmp_path_factory.mktemp("large")
    words = ["--per_device_train_batch_size", "8", "--save_strategy", "no", "--output_dir", str(folder)]
    assert main([*WORDS, *words]) == 0
    return trained(folder)


def test_two_processes_train_the_weights_of_one_with_twice_the_batch(large_batch, tmp_path):
    """BatchNorm over both processes; every valid pixel has the same weight, though their numbers differ."""
    words = ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    processes.run_two([*WORDS, *words], free_port(), tmp_path)
    weights, losses = trained(tmp_path)
    assert losses == pytest.approx(large_batch[1], rel=1e-5)
    assert furthest(weights, large_batch[0]) < 1e-4


def test_two_processes_draw_the_rare_classes_of_one(tmp_path):
    """Each process counts the classes of half of the images."""
    rare = ["--class_balanced_sampling", "--copy_paste", "0.5", "--save_strategy", "no", "--max_steps", "2"]
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert main([*WORDS, *rare, "--per_device_train_batch_size", "8", "--output_dir", str(whole)]) == 0
    words = [*rare, "--per_device_train_batch_size", "4", "--output_dir", str(shared)]
    processes.run_two([*WORDS, *words], free_port(), tmp_path)
    assert trained(shared)[1] == pytest.approx(trained(whole)[1], rel=1e-5)
    assert furthest(trained(shared)[0], trained(whole)[0]) < 1e-4


def frozen_norms_trainer(folder, *words):
    """BatchNorm with its initial statistics, since it alone depends on the whole batch."""
    recipe = load_recipe(None, [*WORDS[1:], "--output_dir", str(folder), *words])
    torch.manual_seed(0)
    data = training_run.load_data(recipe, "train")
    trainer = training_run.build_trainer(recipe, training_run.build_model(recipe.model, data.spec), data, data)
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode, module=module: nn.Module.train(module, False)
    return trainer


@pytest.mark.parametrize(
    "words",
    [pytest.param(["--loss_normalization", "all"], marks=pytest.mark.slow), ["--class_weights", "0.2", *["1.0"] * 10]],
)
def test_accumulated_batches_train_the_weights_of_a_large_one(tmp_path, words):
    """The loss is a mean over valid pixels; a mean of means would weigh crops with many ignored pixels more."""
    ends = []
    for size, steps in (("8", "1"), ("2", "4")):
        batch = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps]
        images = ["--max_train_samples", "24", "--save_strategy", "no"]
        trainer = frozen_norms_trainer(tmp_path, *batch, *words, *images)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        ends.append((dict(trainer.model.state_dict()), losses))
    assert ends[1][1] == pytest.approx(ends[0][1], rel=1e-5)
    # Gradients of norm 70 times a rate of 0.1: rounding in their last bits moves weights by 1e-6.
    assert furthest(ends[1][0], ends[0][0]) < 1e-5


@pytest.mark.slow
def test_the_last_batches_of_an_epoch_are_filled_up_from_its_beginning(tmp_path):
    """10 images for two processes with 4 each: every epoch has two steps, and none waits for a missing batch."""
    words = ["--per_device_train_batch_size", "4", "--max_train_samples", "10", "--dataloader_drop_last", "false"]
    words += ["--max_steps", "4", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    processes.run_two([*WORDS, *words], free_port(), tmp_path)
    history = json.loads((tmp_path / "results.json").read_text())["history"]
    assert [entry["epoch"] for entry in history if "loss" in entry] == [0.5, 1.0, 1.5, 2.0]


def shard_on_cpus():
    """accelerate shards models on accelerators only; torch and gloo can do it on CPUs as well."""
    from accelerate.utils import DistributedType

    from accelerate import state

    begin = state.AcceleratorState.__init__

    def also_on_cpus(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = also_on_cpus


IN_WINDOWS = ["--test_mode", "slide", "--test_crop_size", "48", "64", "--test_stride", "32", "48"]


def test_fsdp_trains_and_evaluates_as_one_process_does(large_batch, tmp_path):
    """Two processes with half of the weights each; unequal numbers of images and windows in the evaluation."""
    words = ["--per_device_train_batch_size", "4", "--save_strategy", "no", "--output_dir", str(tmp_path)]
    processes.run_two([*WORDS, *words, *IN_WINDOWS], free_port(), tmp_path, SHARDED, shard_on_cpus)
    weights, losses = trained(tmp_path)
    assert losses == pytest.approx(large_batch[1], rel=1e-5)
    assert furthest(weights, large_batch[0]) < 1e-4
    data = ["--dataset", "synthetic@64x96", "--max_eval_samples", "3", "--use_cpu", "--output_dir"]
    assert main(["evaluate", str(tmp_path / "model"), *data, str(tmp_path / "alone")]) == 0
    both = [json.loads((folder / "results.json").read_text())["scores"] for folder in (tmp_path, tmp_path / "alone")]
    one, two = (torch.tensor(scores["confusion_matrix"]) for scores in both)
    assert one.sum() == two.sum() > 0
    # Pixels whose two best classes are equal except for rounding may differ: loaded weights lie at other addresses.
    assert (one - two).abs().sum() <= 1e-3 * two.sum()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_fsdp_resumes_to_the_same_weights(tmp_path, optimizer):
    """Also with a learning rate per layer: the groups are made before the model is sharded."""
    words = ["--per_device_train_batch_size", "4", "--save_steps", "2", "--output_dir", str(tmp_path)]
    words += ["--optim", optimizer, "--layer_decay", "0.9", "--lr_scheduler_type", "constant"]
    words += [] if optimizer == "sgd" else ["--optim_args", "eps=1e-6", "--learning_rate", "1.0e-3"]
    processes.run_two([*WORDS, *words], free_port(), tmp_path, SHARDED, shard_on_cpus)
    weights = trained(tmp_path)[0]
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-3")
    assert main([*WORDS, *words, "--per_device_train_batch_size", "8"]) == 2  # without FSDP
    processes.run_two([*WORDS, *words], free_port(), tmp_path, SHARDED, shard_on_cpus)
    assert json.loads((tmp_path / "results.json").read_text())["training"]["resumed_from_step"] == 2
    assert furthest(trained(tmp_path)[0], weights) == 0


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, [], "does not shard models on a CPU"),
        ({"FSDP_VERSION": "1"}, [], "fsdp_version: 2"),
        ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, [], "fsdp_state_dict_type: FULL_STATE_DICT"),
        ({}, ["--ema_decay", "0.9"], "ema_decay does not work with FSDP"),
    ],
)
def test_what_does_not_work_under_fsdp_is_refused_before_training(environment, words, message):
    from accelerate.utils import FullyShardedDataParallelPlugin

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (SHARDED | environment).items():
            patch.setenv(name, value)
        args = load_recipe(None, ["--use_cpu", *words]).training
        plugin = FullyShardedDataParallelPlugin() if environment or words else None
        model = hf_denseseg.create_model("dsct-tiny-sac", **SIZES)
        with pytest.raises(InputError, match=message):
            prepare_fsdp(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), args, model)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_accepts_the_configurations(path):
    """Every key is known to this version of accelerate, and `accelerate launch` accepts the file."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(path))
    assert (
        "accelerate launch --config_file scripts/accelerate/" in path.read_text()
        or "machines.yaml" in path.read_text()
    )
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "scripts/train.py"])
    )
    assert args.num_processes == config.num_processes and args.num_machines == config.num_machines
    assert args.use_fsdp == (config.distributed_type.value == "FSDP")
    if args.use_fsdp:
        assert (args.fsdp_version, args.fsdp_state_dict_type) == (2, "FULL_STATE_DICT")


@pytest.mark.slow
def test_a_resumed_batch_may_be_split_differently_but_not_change(large_batch, tmp_path):
    words = ["--save_steps", "2", "--output_dir", str(tmp_path)]
    assert main([*WORDS, *words, "--per_device_train_batch_size", "8", "--max_steps", "3"]) == 0
    (tmp_path / "results.json").unlink()
    shutil.rmtree(tmp_path / "checkpoint-3")
    smaller = ["--per_device_train_batch_size", "4"]
    assert main([*WORDS, *words, *smaller]) == 2
    processes.run_two([*WORDS, *words, *smaller], free_port(), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["training"]["resumed_from_step"] == 2
    assert furthest(trained(tmp_path)[0], large_batch[0]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["DDP", "FSDP"])
def test_two_gpus_train_the_weights_of_one_with_twice_the_batch(tmp_path, environment):
    """Over NCCL, with BatchNorm over both."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    on_gpus = [word for word in WORDS if word != "--use_cpu"]
    for name, size in (("one", "8"), ("two", "4")):
        words = [*on_gpus, "--per_device_train_batch_size", size, "--save_strategy", "no"]
        words += ["--output_dir", str(tmp_path / name)]
        if name == "two":
            processes.run_two(words, free_port(), tmp_path, environment)
        else:
            processes.start(words, {"CUDA_VISIBLE_DEVICES": "0"}).join()
    assert furthest(trained(tmp_path / "one")[0], trained(tmp_path / "two")[0]) < 1e-3
