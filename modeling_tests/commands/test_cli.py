"""The command line: help that teaches, exit codes, and the small commands."""

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import hf_denseseg
from hf_denseseg.cli import COMMANDS, build_parser, main, parse_arguments
from hf_denseseg.commands.help_format import laid_out
from hf_denseseg.evaluation.score_names import constant_prediction_miou
from hf_denseseg.models.auto.registration import create_image_processor
from model_tester import pooling_exports_for_any_size
from reference import FIXTURES, REPOSITORY
from test_published_dsct import REDUCED as TINY
from test_published_setr import REDUCED as SETR


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    model = hf_denseseg.create_model("dsct-tiny-sac", num_labels=3, **TINY)
    model.save_pretrained(folder)
    create_image_processor(model.config).save_pretrained(folder)
    return folder


def parsers(parser=None):
    """Every command and subcommand: words that call it -> its parser."""
    parser = parser or build_parser()
    found = {parser.prog: parser}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                found |= parsers(each)
    return found


@pytest.mark.parametrize("words", parsers())
def test_help_shows_an_example_and_fits_a_terminal(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = parsers()[words]
    text = parser.format_help()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert re.search(rf"^examples?:\n(  .*\n)*?  {words} ?", text, flags=re.MULTILINE)
    assert [each.dest for each in parser._actions if not each.help and each.metavar not in ("ACTION", "COMMAND")] == []


def test_examples_of_the_help_are_commands_that_parse(monkeypatch):
    """Those of `denseseg` itself; continued lines are joined first."""
    monkeypatch.setenv("COLUMNS", "80")
    for words, parser in parsers().items():
        text = re.sub(r" \\\n\s*", " ", parser.format_help())
        commands = re.findall(rf"^  ({words}(?: .*?)?)(?:   .*)?$", text.partition("example")[2], flags=re.MULTILINE)
        for command in commands:
            parse_arguments(shlex.split(command)[1:])
        assert commands or words == "denseseg", words


def test_help_is_laid_out_for_the_width():
    text = (
        "One two three four\nfive six.\n\nexamples:\n  denseseg go --first '{a: 1}' --second 2 3 \\\n      --third\n"
        "  name   what it means\nlast"
    )
    assert list(laid_out(text, 24)) == [
        *("One two three four five", "six.", "", "examples:"),
        *("  denseseg go \\", "      --first '{a: 1}' \\", "      --second 2 3 \\", "      --third"),
        *("  name   what it means", "last", ""),
    ]
    assert list(laid_out("  name   what it means", 18)) == ["  name   what it", "         means", ""]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_is_printed(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: denseseg {command}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["trian"], ["models", "--nonsense"], ["export", "folder"]])
def test_wrong_usage_ends_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "words, proposed",
    [
        ("predict model images --every 3", "--frame_stride"),  # had this name before
        ("predict model images --output masks", "--output_dir"),
        ("predict model images --output_dir masks --crop_size 64 64", "--test_crop_size"),
        ("predict model images --output_dir=masks --treshold=0.4", "--threshold"),
        ("data pack --ouput_dir shards", "--output_dir"),  # an option of a subcommand
        ("kernels build --option", "--optional"),  # no abbreviations
    ],
)
def test_an_option_of_another_name_is_refused_with_the_right_one(words, proposed, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert stop.value.code == 2
    assert f"Did you mean {proposed!r}" in capsys.readouterr().err


# Runs `denseseg` on the given words; the last line of its output tells the exit code and what was imported.
DENSESEG = """
import sys, denseseg_command
try:
    code = denseseg_command.main()
except SystemExit as stop:
    code = stop.code
print(code, *sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("words", "code", "shown"),
    [
        (["--help"], 0, "denseseg demo"),
        (["--version"], 0, f"hf-denseseg {hf_denseseg.__version__}"),
        (["train", "--help"], 0, "denseseg train RECIPE.yaml"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["predict", "model"], 2, "required: INPUT, --output_dir"),
        (["kernels", "bench", "--cases", "detr"], 2, "invalid choice: 'detr'"),
    ],
)
def test_help_and_wrong_usage_do_not_wait_for_torch(words, code, shown):
    done = subprocess.run([sys.executable, "-c", DENSESEG, *words], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == str(code), done.stdout + done.stderr
    assert shown in done.stdout + done.stderr


def test_a_command_that_runs_registers_the_families():
    script = DENSESEG + "import hf_denseseg; print(hf_denseseg.DsctConfig.model_type)\n"
    script += "print(type(sys.modules['transformers'].AutoConfig.for_model('hlg')) is hf_denseseg.HlgConfig)"
    done = subprocess.run([sys.executable, "-c", script, "data", "list"], capture_output=True, text=True)
    assert done.stdout.splitlines()[-3:] == ["0 numpy torch transformers", "dsct", "True"], done.stderr


def test_the_console_script_is_the_module_outside_the_package():
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert pyproject["project"]["scripts"] == {"denseseg": "denseseg_command:main"}
    included = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["src/denseseg_command.py"] == "denseseg_command.py"


def test_choices_that_are_written_out_are_those_of_the_modules_that_they_name():
    from hf_denseseg.commands import kernels, predict
    from hf_denseseg.inference.introspection import inspection
    from hf_denseseg.inference.predict import outputs
    from hf_denseseg.ops import kernel_benchmark

    assert set(kernels.CASES) == set(kernel_benchmark.CASES)
    assert set(predict.SHOWABLE) == set(inspection.KINDS)
    assert (set(predict.KINDS), set(predict.NEEDS)) == (set(outputs.KINDS), set(outputs.NEEDS))


def test_interrupted_run_says_how_to_go_on(capsys, monkeypatch):
    from hf_denseseg.commands import models

    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "main", interrupt)
    assert main(["models"]) == 1
    assert "run the same command again" in capsys.readouterr().err


def test_recipe_keys_and_own_options_are_told_apart():
    args = parse_arguments(["train", "recipe.yaml", "--crop_size", "1", "2", "--print_config", "--max_steps", "3"])
    assert (args.recipe, args.print_config) == ("recipe.yaml", True)
    assert args.overrides == ["--crop_size", "1", "2", "--max_steps", "3"]
    assert parse_arguments(["train", "--max_steps", "3"]).recipe is None


def test_print_config_shows_the_resolved_recipe(capsys):
    assert main(["train", "--max_steps", "3", "--print_config"]) == 0
    assert "max_steps: 3" in capsys.readouterr().out


def test_keys_are_listed_with_their_meaning(capsys):
    assert main(["train", "--keys"]) == 0
    text = capsys.readouterr().out
    assert "cat_max_ratio" in text and "(10 tries) [default: 0.75] [only semantic-segmentation]" in text
    assert "adam_beta2" in text and "[only object-detection, instance-segmentation]" in text


def test_keys_fit_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["train", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and any(line.startswith("cat_max_ratio ") for line in lines)


def test_models_prints_the_counts_of_the_paper(capsys):
    assert main(["models", "dsct-tiny-*", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert sorted(table) == hf_denseseg.list_models("dsct-tiny-*")
    assert table["dsct-tiny-sac"]["parameters"] == hf_denseseg.create_model("dsct-tiny-sac").num_parameters()
    assert main(["models", "dsct-tiny-sac"]) == 0
    assert "dsct-tiny-sac" in capsys.readouterr().out


@pytest.mark.skipif(pooling_exports_for_any_size(), reason="this release of torch exports pooling for any size")
def test_a_model_that_torch_exports_for_some_sizes_only_is_refused(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "exported")]) == 1
    assert "A newer torch" in capsys.readouterr().err


def test_exported_program_equals_the_model(tmp_path):
    model = hf_denseseg.create_model("setr-naive-deit-base", num_labels=3, **SETR).eval()
    model.save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--output", str(tmp_path / "exported")]) == 0
    program = torch.export.load(tmp_path / "exported" / "model.pt2").module()
    pixel_values = torch.randn(1, 3, 70, 83)
    with torch.no_grad():
        assert torch.allclose(program(pixel_values)[0], model(pixel_values).logits, atol=1e-4)


def test_export_refuses_a_file_and_a_folder_of_other_files(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "model.onnx")]) == 2
    assert "give a folder" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["export", str(checkpoint), "--output", str(tmp_path)]) == 2
    assert "holds other files" in capsys.readouterr().err


def test_official_checkpoint_becomes_a_folder_that_the_auto_class_loads(tmp_path, capsys):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    case = next((FIXTURES / "dsct").iterdir())
    words = ["convert", "dsct", str(case / "weights.safetensors"), str(case / "config.json")]
    assert main([*words, "--output_dir", str(tmp_path)]) == 0
    assert "DsctForImageClassification" in capsys.readouterr().out
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is hf_denseseg.DsctForImageClassification
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is hf_denseseg.DsctImageProcessor
    assert (
        main(["convert", "dsct", str(tmp_path / "nowhere.pth"), "dsct-tiny-sac", "--output_dir", str(tmp_path)]) == 2
    )
    assert "nowhere.pth" in capsys.readouterr().err


def test_config_fields_of_a_conversion_are_given_as_in_a_recipe(tmp_path, capsys):
    case = FIXTURES / "setr" / "mla_small"
    words = [
        "convert",
        "setr",
        str(case / "weights.safetensors"),
        str(case / "config.json"),
        "--output_dir",
        str(tmp_path),
    ]
    assert main([*words, "--config_overrides", "{auxiliary_loss_weight: 0.2}"]) == 0
    config = hf_denseseg.SetrForSemanticSegmentation.from_pretrained(tmp_path).config
    assert config.auxiliary_loss_weight == 0.2 and config.num_labels == 7
    for wrong, message in (
        ("0.2", "write '{field: value"),
        ("{patch_size: 12}", "does not divide"),
        ("{hed: 1}", "hed"),
    ):
        assert main([*words, "--config_overrides", wrong]) == 2
        assert message in capsys.readouterr().err


def test_push_needs_a_complete_folder(tmp_path, capsys):
    assert main(["push", str(tmp_path), "someone/something"]) == 2
    assert "lacks config.json, README.md" in capsys.readouterr().err


def test_push_without_network_is_one_sentence(checkpoint, capsys):
    (checkpoint / "README.md").write_text("card")
    assert main(["push", str(checkpoint), "someone/something"]) == 1
    assert capsys.readouterr().err.startswith("failed: Nothing was pushed to someone/something")
    assert main(["push", str(checkpoint), "not a name"]) == 2


def test_push_uploads_the_folder_to_the_named_repository(checkpoint, capsys, monkeypatch):
    import huggingface_hub

    (checkpoint / "README.md").write_text("card")
    calls = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: calls.append(name))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **options: calls.append(options))
    assert main(["push", str(checkpoint), "someone/something"]) == 0
    assert calls[0] == "someone/something"
    assert (calls[1]["repo_id"], calls[1]["folder_path"]) == ("someone/something", checkpoint)


def test_push_makes_a_space_and_a_second_push_completes_it(checkpoint, capsys, monkeypatch):
    import huggingface_hub

    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\n---\ncard")
    calls = []

    def upload(self, **options):
        if options.get("repo_type") == "space":
            if not calls:
                calls.append("failed")
                raise OSError("the connection broke")
            calls.append(sorted(path.name for path in Path(options["folder_path"]).iterdir()))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    words = ["push", str(checkpoint), "someone/something", "--space", "--endpoint"]
    assert main(words) == 1 and "The Space was not pushed, the model was" in capsys.readouterr().err
    assert main(words) == 0 and calls[1] == ["README.md", "app.py", "requirements.txt"]
    assert "EndpointHandler" in (checkpoint / "handler.py").read_text()
    assert (checkpoint / "modeling_hf_denseseg.py").exists()


def test_damaged_and_foreign_checkpoints_are_refused(checkpoint, tmp_path, capsys):
    from transformers import SegformerConfig, SegformerModel

    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text((checkpoint / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:2000])
    words = ["--dataset", "synthetic", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", str(damaged), *words]) == 2
    assert "no complete semantic segmentation checkpoint" in capsys.readouterr().err
    config = SegformerConfig(hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4)
    SegformerModel(config).save_pretrained(tmp_path / "foreign")
    assert main(["evaluate", str(tmp_path / "foreign"), *words]) == 2
    assert "Train a segmentation head first" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), *words]) == 2  # three classes, the data has more
    assert "has 3 classes" in capsys.readouterr().err


def test_chance_level_is_the_best_constant_prediction():
    """The IoU of its class is the fraction of its pixels, others have 0: 60 % of the pixels, 1 of 2 classes -> 0.3."""
    rows = [{"class": "a", "pixels": 60}, {"class": "b", "pixels": 40}, {"class": "absent", "pixels": 0}]
    assert constant_prediction_miou({"per_class": rows}) == (pytest.approx(0.3), "a")


def test_a_reader_that_closes_the_pipe_is_no_failure():
    """As in `denseseg data list | head -1`."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody, contextlib.redirect_stdout(nobody):
        assert main(["data", "list"]) == 0
