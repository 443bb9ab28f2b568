"""Common tests of every family: subclass `SegmentationModelTester`, name the classes, give tiny sizes."""

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.export import Dim
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForSemanticSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import output_capturing

import hf_denseseg
import partial_training
import weight_use
from closeness import assert_same_outputs
from hf_denseseg.errors import InputError
from hf_denseseg.inference.introspection.inspection import inspect_model
from hf_denseseg.models.auto.remote_code import write_code
from hf_denseseg.models.channels import image_channels, with_image_channels
from processor_tester import random_image
from travelling_code import logits_without_the_package

NUM_LABELS = 5


def freeze_batch_norm(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def fields(config: PreTrainedConfig) -> dict[str, Any]:
    """All fields of a configuration except the folder that it was loaded from."""
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}


@functools.cache
def pooling_exports_for_any_size() -> bool:
    """Older releases of torch guard on the parity of a pooled size (2.11 does, 2.15 does not)."""
    dynamic = ({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
    exported = torch.export.export(pool, (torch.zeros(2, 3, 32, 48),), dynamic_shapes=dynamic).module()
    try:
        exported(torch.zeros(2, 3, 31, 47))
    except AssertionError:
        return False
    return True


class Logits(nn.Module):
    """Tensors in, tensor out, as the exporter needs it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


class SegmentationModelTester:
    """Contract of a segmentation family; a subclass sets the attributes and adds tests of its paper."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    base_class: type[PreTrainedModel]
    backbone_class: type[PreTrainedModel]
    tiny: dict[str, Any]
    traced: dict[str, Any] = {}  # fewer layers for compiling and exporting, which take seconds each
    output_stride: int
    smallest_side = 13
    smallest_exported_side = 29
    typing_error = {"num_atention_heads": 2}
    wrong_type = {"hidden_size": "wide"}
    pools = False  # whether a part of the model is a pooling layer
    has_attentions = True
    shows_features = True
    own_outputs: tuple[str, ...] = ()  # outputs besides loss, logits and hidden states

    def logits_size(self, height: int, width: int) -> tuple[int, int]:
        """Size of the logits for an image of this size."""
        return -(-height // self.output_stride), -(-width // self.output_stride)

    @pytest.fixture
    def config(self) -> PreTrainedConfig:
        return self.config_class(**self.tiny, num_labels=NUM_LABELS)

    @pytest.fixture
    def model(self, config: PreTrainedConfig) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.model_class(config).eval()

    @pytest.fixture
    def traced_model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = self.config_class(**{**self.tiny, **self.traced}, num_labels=NUM_LABELS)
        return self.model_class(config).eval()

    @pytest.fixture
    def batch(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        labels = torch.randint(0, NUM_LABELS, (2, 48, 64), generator=generator)
        labels[0, :5] = 255
        return {"pixel_values": torch.randn(2, 3, 48, 64, generator=generator), "labels": labels}

    # --- saving, loading, initializing

    @torch.no_grad()
    def test_checkpoint_carries_its_code(self, model, batch, tmp_path, monkeypatch):
        monkeypatch.setenv("DENSESEG_MSDA", "reference")  # without the kernels library nothing else runs
        model.save_pretrained(tmp_path / "model")
        hf_denseseg.create_image_processor(model.config).save_pretrained(tmp_path / "model")
        write_code(tmp_path / "model")
        found = logits_without_the_package(tmp_path / "model", batch["pixel_values"])
        assert_same_outputs(found, model(batch["pixel_values"]).logits)

    @torch.no_grad()
    def test_saved_model_gives_the_same_logits_through_the_auto_class(self, model, batch, tmp_path):
        expected = model(batch["pixel_values"]).logits
        model.save_pretrained(tmp_path / "first")
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "first")
        assert type(loaded) is self.model_class
        assert_same_outputs(loaded(batch["pixel_values"]).logits, expected)
        loaded.save_pretrained(tmp_path / "second")
        assert fields(AutoConfig.from_pretrained(tmp_path / "second")) == fields(loaded.config)

    @torch.no_grad()
    def test_loads_a_torch_file(self, model, batch, tmp_path):
        model.config.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        loaded = self.model_class.from_pretrained(tmp_path)
        assert_same_outputs(loaded(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits)

    def test_loads_from_a_state_dict_that_is_not_contiguous(self, model):
        state = {
            name: value.t().contiguous().t() if value.ndim == 2 else value
            for name, value in model.state_dict().items()
        }
        loaded = self.model_class.from_pretrained(None, config=model.config, state_dict=state)
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())

    def test_base_weights_load_into_the_task_model_and_back(self, config, model, tmp_path):
        model.save_pretrained(tmp_path / "task")
        base, report = self.base_class.from_pretrained(tmp_path / "task", output_loading_info=True)
        assert not report["missing_keys"]
        base.save_pretrained(tmp_path / "base")
        task, report = self.model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
        prefix = f"{self.model_class.base_model_prefix}."
        own = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
        assert {name for name in report["missing_keys"] if name in own} == own
        assert not any(name.startswith(prefix) for name in report["missing_keys"])

    def test_wrong_number_of_labels_raises_or_creates_a_new_head_on_request(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="size"):
            self.model_class.from_pretrained(tmp_path, num_labels=NUM_LABELS + 2)
        other = self.model_class.from_pretrained(tmp_path, num_labels=NUM_LABELS + 2, ignore_mismatched_sizes=True)
        assert other.config.num_labels == NUM_LABELS + 2
        assert all(value.isfinite().all() for value in other.parameters())

    def test_missing_weights_are_initialized_exactly_as_by_the_constructor(self, config, monkeypatch):
        # Every random draw starts from one seed, so that values do not depend on the number of draws before.
        for name in ("normal_", "uniform_"):
            draw = getattr(torch.Tensor, name)

            def seeded(tensor, *args, draw=draw, **kwargs):
                torch.manual_seed(3)
                return draw(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, seeded)
        built = self.model_class(copy.deepcopy(config)).state_dict()
        loaded = self.model_class.from_pretrained(None, config=copy.deepcopy(config), state_dict={}).state_dict()
        different = [name for name, value in built.items() if not torch.equal(value, loaded[name])]
        assert not different, f"{different[:5]} are not produced by _init_weights"

    @torch.no_grad()
    def test_model_built_on_the_meta_device_can_be_initialized_later(self, config, batch):
        with torch.device("meta"):
            model = self.model_class(config)
        assert {value.device.type for value in model.state_dict().values()} == {"meta"}
        model = model.to_empty(device="cpu")
        model.init_weights()
        assert model.eval()(batch["pixel_values"]).logits.isfinite().all()

    # --- configuration

    def test_configuration_survives_json(self, config, tmp_path):
        config.save_pretrained(tmp_path)
        assert fields(AutoConfig.from_pretrained(tmp_path)) == fields(config)
        assert fields(self.config_class.from_dict(config.to_dict())) == fields(config)

    def test_default_configuration_is_valid_and_has_the_common_fields(self):
        config = self.config_class()
        assert config.hidden_size > 0 and config.num_attention_heads > 0 and config.num_hidden_layers > 0

    def test_misspelled_field_proposes_the_right_one(self):
        with pytest.raises(ValueError, match="Did you mean"):
            self.config_class(**self.typing_error)

    def test_unknown_field_is_refused_in_a_call_and_kept_with_a_warning_from_a_file(self, config, tmp_path, caplog):
        with pytest.raises(ValueError, match=f"{self.config_class.__name__} has no field 'gear'"):
            self.config_class(**self.tiny, gear=3)
        name = next(iter(self.typing_error))
        for unknown in ("gear", name):
            setattr(config, unknown, 3)
        config.save_pretrained(tmp_path)
        for read in (AutoConfig.from_pretrained, self.config_class.from_pretrained):
            caplog.clear()
            loaded = read(tmp_path)
            assert loaded.gear == getattr(loaded, name) == 3 and fields(loaded) == fields(config)
            assert "no field 'gear'" in caplog.text and f"no field {name!r}. Did you mean" in caplog.text
            assert "later version" in caplog.text
        with pytest.raises(ValueError, match="has no field"):
            self.config_class(gear=3)

    def test_wrong_type_is_refused(self):
        with pytest.raises(StrictDataclassError):
            self.config_class(**self.wrong_type)

    # --- outputs

    @torch.no_grad()
    def test_forward_is_deterministic_and_images_do_not_mix(self, model, batch):
        together = model(batch["pixel_values"]).logits
        assert torch.equal(model(batch["pixel_values"]).logits, together)
        alone = model(batch["pixel_values"][1:]).logits
        torch.testing.assert_close(together[1:], alone, atol=1e-4 * float(alone.std()), rtol=0)

    @torch.no_grad()
    @pytest.mark.parametrize("size", [(0, 0), (0, 40), (37, 61), (64, 64), (97, 33)])
    def test_any_size_gives_logits_of_the_stride(self, model, size):
        height, width = (side or self.smallest_side for side in size)
        logits = model(torch.randn(1, 3, height, width)).logits
        assert logits.shape == (1, NUM_LABELS, *self.logits_size(height, width))
        assert logits.isfinite().all()

    @pytest.mark.parametrize("count", [1, 4, 6])
    @torch.no_grad()
    def test_weights_of_three_channels_are_adapted_to_any_number(self, model, batch, count):
        torch.manual_seed(1)
        adapted = with_image_channels(model, count)
        assert image_channels(adapted.config) == count and not adapted.training
        gray = batch["pixel_values"][:, :1]
        found = adapted(gray.expand(-1, count, -1, -1)).logits
        assert found.isfinite().all()
        if count != 4:  # the sum of the kernels is that of three channels
            expected = model(gray.expand(-1, 3, -1, -1)).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(InputError, match=f"takes {count} channels"):
            with_image_channels(adapted, 5)

    def test_image_below_one_patch_is_refused_with_the_reason(self, model):
        with pytest.raises(ValueError, match=f"at least {self.smallest_side}"):
            model(torch.zeros(1, 3, self.smallest_side - 1, 64))

    @torch.no_grad()
    def test_tuple_and_named_output_agree(self, model, batch):
        named = model(**batch, output_hidden_states=True)
        plain = model(**batch, output_hidden_states=True, return_dict=False)
        assert_same_outputs(plain[:2], (named.loss, named.logits))
        assert len(plain) == len(named.to_tuple()) == 3 + len(self.own_outputs)
        assert set(self.own_outputs) <= set(named)
        assert model(batch["pixel_values"], return_dict=False)[0].shape == named.logits.shape

    def test_hidden_states_and_attentions_come_on_request(self, config, batch):
        config._attn_implementation = "eager"
        model = self.model_class(config).eval()
        plain = model(batch["pixel_values"])
        assert plain.hidden_states is None and plain.attentions is None
        outputs = model(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
        assert len(outputs.hidden_states) == config.num_hidden_layers + 1
        assert len(outputs.attentions) == config.num_hidden_layers
        length = outputs.hidden_states[0].shape[1]
        assert {tuple(each.shape) for each in outputs.attentions} == {(2, config.num_attention_heads, length, length)}
        torch.testing.assert_close(outputs.attentions[0].sum(-1), torch.ones(2, config.num_attention_heads, length))
        outputs.hidden_states[0].retain_grad()
        outputs.logits.sum().backward()
        assert outputs.hidden_states[0].grad.abs().sum() > 0

    @torch.no_grad()
    def test_every_class_returns_tuples_on_request_of_call_or_configuration(self, config, batch):
        for kind in (self.model_class, self.base_class, self.backbone_class):
            torch.manual_seed(0)
            model = kind(copy.deepcopy(config)).eval()
            expected = model(batch["pixel_values"]).to_tuple()
            assert_same_outputs(model(batch["pixel_values"], return_dict=False), expected)
            model.config.return_dict = False
            assert_same_outputs(model(batch["pixel_values"]), expected)
            assert_same_outputs(model(batch["pixel_values"], return_dict=True).to_tuple(), expected)

    @torch.no_grad()
    def test_outputs_on_request_may_be_set_in_the_configuration(self, config, batch):
        config._attn_implementation = "eager"
        for kind in (self.model_class, self.base_class, self.backbone_class):
            torch.manual_seed(0)
            model = kind(copy.deepcopy(config)).eval()
            asked = {"output_hidden_states": True}
            if self.has_attentions:
                asked["output_attentions"] = True
            expected = model(batch["pixel_values"], **asked)
            for name, value in asked.items():
                setattr(model.config, name, value)
            found = model(batch["pixel_values"])
            assert len(found.hidden_states) == len(expected.hidden_states) > 0
            assert_same_outputs(found.hidden_states, expected.hidden_states)
            assert not self.has_attentions or len(found.attentions) > 0
            assert_same_outputs(found.attentions, expected.attentions)
            assert model(batch["pixel_values"], output_hidden_states=False).hidden_states is None

    @torch.no_grad()
    @pytest.mark.skipif(
        not hasattr(output_capturing, "selected_hidden_states"), reason="this release of transformers knows no choice"
    )
    @pytest.mark.parametrize("chosen", [[0, 2], [-1]])
    def test_chosen_hidden_states_come_at_their_places(self, config, batch, chosen):
        for kind in (self.model_class, self.base_class, self.backbone_class):
            torch.manual_seed(0)
            model = kind(config).eval()
            every = model(batch["pixel_values"], output_hidden_states=True).hidden_states
            found = model(batch["pixel_values"], output_hidden_states=chosen).hidden_states
            kept = {index % len(every) for index in chosen}
            assert len(found) == len(every)
            for index, each in enumerate(found):
                assert (each is not None) == (index in kept)
                assert each is None or torch.equal(each, every[index])

    def test_features_of_many_images_equal_those_of_single_ones(self, config, tmp_path):
        """The pipeline splits the outputs of a batch by position."""
        self.base_class(config).save_pretrained(tmp_path)
        processor = getattr(hf_denseseg, self.config_class.__name__.replace("Config", "ImageProcessor"))
        processor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu", return_tensors=True)
        images = [random_image(seed=seed) for seed in range(9)]
        found, expected = extract(images, batch_size=8), [extract(image) for image in images]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4 * float(other.std()), rtol=0)

    @torch.no_grad()
    def test_shown_features_are_numbered_by_layer(self, model):
        """What enters the first layer is none of them, whatever its shape."""
        pixel_values = torch.randn(1, 3, 64, 96)
        found = inspect_model(model, pixel_values, kinds=["features"]).features
        states = model(pixel_values, output_hidden_states=True).hidden_states
        count = model.config.num_hidden_layers
        assert len(found) == (count if self.shows_features else 0)
        for each, state in zip(found, states[len(states) - count :], strict=False):
            if state.ndim == 3:  # tokens, after those that belong to no patch
                state = state[:, -each[0].numel() :].transpose(1, 2).unflatten(2, each.shape[1:])
            torch.testing.assert_close(each, state[0])

    # --- one logit for background and foreground

    @pytest.fixture
    def one_logit_model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.model_class(self.config_class(**self.tiny, num_labels=1)).eval()

    def test_one_logit_tells_background_and_foreground_apart(self, one_logit_model, batch):
        model, labels = one_logit_model, batch["labels"] % 2
        labels[batch["labels"] == 255] = 255
        assert model(batch["pixel_values"]).logits.shape[:2] == (2, 1)
        loss = model.train()(batch["pixel_values"], labels=labels).loss
        assert loss > 0
        loss.backward()
        learned = gradients(model)
        assert all(each.isfinite().all() for each in learned.values())
        missing = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
        assert not missing, f"no gradient reaches {missing[:5]}"
        assert any(each.shape[0] == 1 and each.abs().sum() > 0 for each in learned.values())
        with pytest.raises(InputError, match="legal are 0 to 1, and"):
            model(batch["pixel_values"], labels=torch.full_like(labels, 2))

    @torch.no_grad()
    def test_checkpoint_of_one_logit_gives_two_masks_in_the_plain_pipeline(self, one_logit_model, tmp_path):
        assert one_logit_model.config.id2label == {0: "background", 1: "foreground"}
        one_logit_model.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        assert loaded.config.num_labels == 1 and loaded.config.id2label == one_logit_model.config.id2label
        align_corners = getattr(loaded.config, "align_corners", False)
        kind = getattr(hf_denseseg, self.config_class.__name__.replace("Config", "ImageProcessor"))
        processor, image = kind(align_corners=align_corners), random_image(seed=1)
        size = (image.height, image.width)
        logits = loaded(**processor(image, return_tensors="pt")).logits
        logit = nn.functional.interpolate(logits, size, mode="bilinear", align_corners=align_corners)[0, 0]
        # With the median as threshold one half of the pixels is foreground.
        processor.threshold = float(logit.median().sigmoid())
        processor.save_pretrained(tmp_path)
        masks = pipeline("image-segmentation", model=str(tmp_path), device="cpu")(image)
        assert [each["label"] for each in masks] == ["background", "foreground"]
        background, foreground = (torch.from_numpy(np.array(each["mask"])) == 255 for each in masks)
        assert (foreground != (logit > logit.median())).float().mean() < 0.01
        assert torch.equal(background, ~foreground)

    def test_another_number_of_labels_replaces_the_one_logit(self, one_logit_model, tmp_path):
        one_logit_model.save_pretrained(tmp_path)
        for count in (2, 3):
            other = self.model_class.from_pretrained(tmp_path, num_labels=count, ignore_mismatched_sizes=True)
            assert other.config.num_labels == len(other.config.id2label) == count

    # --- more classes than bytes can number

    def test_class_255_of_300_learns_and_65535_is_ignored(self, batch):
        torch.manual_seed(0)
        model = self.model_class(self.config_class(**self.tiny, num_labels=300)).eval()
        pixel_values, labels = batch["pixel_values"], torch.full_like(batch["labels"], 255)
        labels[0] = 299
        loss = model(pixel_values, labels=labels).loss
        loss.backward()
        rows = [each for name, each in gradients(model).items() if each.shape[0] == 300 and each.ndim > 1]
        assert rows and all((each[[255, 299]].flatten(1).abs().sum(1) > 0).all() for each in rows)
        partly = [labels.clone(), labels.clone(), labels.to(torch.int32)]
        partly[0][:, :20] = partly[2][:, :20] = 65535
        partly[1][:, :20] = -100
        losses = [model(pixel_values, labels=each).loss.item() for each in partly]
        assert losses == pytest.approx([losses[0]] * 3) and losses[0] != pytest.approx(loss.item(), rel=1e-6)
        nothing = [model(pixel_values, labels=torch.full_like(labels, ignored)).loss for ignored in (65535, -100)]
        assert_same_outputs(*nothing)
        assert nothing[0] < loss / 10
        with pytest.raises(InputError, match="ids 300 that are no class: legal are 0 to 299, and 65535"):
            model(pixel_values, labels=torch.full_like(labels, 300))

    # --- bad input

    @pytest.mark.parametrize("wrong", [-1, NUM_LABELS, 254])
    def test_ids_that_are_no_class_are_refused(self, model, batch, wrong):
        batch["labels"][1, 3, 4] = wrong
        with pytest.raises(InputError, match=rf"ids {wrong} that are no class: legal are 0 to {NUM_LABELS - 1}, and"):
            model(**batch)

    @pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x[:1], lambda x: x[0], lambda x: x.float()])
    def test_labels_of_another_form_are_refused(self, model, batch, change):
        labels = change(batch["labels"])
        with pytest.raises(InputError, match=rf"shape \({labels.shape[0]}, .*{labels.dtype}; \(2, H, W\)"):
            model(batch["pixel_values"], labels=labels)

    def test_ignored_id_among_the_classes_is_refused(self, batch):
        config = self.config_class(**{**self.tiny, "semantic_loss_ignore_index": 3}, num_labels=NUM_LABELS)
        with pytest.raises(InputError, match="`semantic_loss_ignore_index` 3 is one of the 5 classes"):
            self.model_class(config)(**batch)

    def test_batch_without_images_is_refused(self, model, batch):
        empty, single = batch["pixel_values"][:0], batch["pixel_values"][0]
        for wrong in ({"pixel_values": empty, "labels": batch["labels"][:0]}, {"pixel_values": single}):
            with pytest.raises(InputError, match="a batch of at least one image"):
                model(**wrong)

    def test_labels_of_another_size_are_compared_with_resized_logits(self, model, batch):
        labels = torch.full((2, 30, 50), 255)
        labels[:, ::7, ::9] = batch["labels"][:, :30:7, :50:9]
        assert model(batch["pixel_values"], labels=labels).loss.isfinite()

    # --- training

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_ignored_labels_may_be_255_or_minus_100_in_any_integer_type(self, model, batch, dtype):
        expected = model(**batch).loss
        labels = batch["labels"].to(dtype)
        assert_same_outputs(model(batch["pixel_values"], labels=labels).loss, expected)
        if dtype.is_signed:
            labels = torch.where(labels == 255, -100, labels)
            assert_same_outputs(model(batch["pixel_values"], labels=labels).loss, expected)

    def test_crop_of_ignored_pixels_gives_zero_loss_and_finite_gradients(self, model, batch):
        loss = model(batch["pixel_values"], labels=torch.full_like(batch["labels"], 255)).loss
        loss.backward()
        assert loss.item() == 0
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    def test_every_parameter_learns(self, model, batch):
        model.train()(**batch).loss.backward()
        missing = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
        assert not missing, f"no gradient reaches {missing[:5]}"

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing_changes_nothing_and_runs_batch_norms_once(self, model, batch, reentrant):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | nn.Dropout2d) or hasattr(module, "rate"):
                module.eval()
        other = copy.deepcopy(model)
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        layers = [each for each in other.modules() if isinstance(each, GradientCheckpointingLayer)]
        assert layers and all(layer.gradient_checkpointing for layer in layers)
        for each in (model, other):
            each(**batch).loss.backward()
        expected, found = gradients(model), gradients(other)
        learning = {name for name, each in model.named_parameters() if each.requires_grad}
        assert expected.keys() == found.keys() == learning
        # Without gradients attention may take another kernel, so buffers are equal only up to rounding.
        expected, found = expected | dict(model.named_buffers()), found | dict(other.named_buffers())
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")

    def test_accumulated_gradients_equal_the_large_batch(self, model, batch):
        """A loss that Trainer divides by the number of items would be wrong by a factor of the number of steps."""
        assert model.accepts_loss_kwargs is False
        labels = torch.where(batch["labels"] == 255, 0, batch["labels"])
        model(batch["pixel_values"], labels=labels).loss.backward()
        expected = gradients(model)
        model.zero_grad()
        for row in range(2):
            (model(batch["pixel_values"][row : row + 1], labels=labels[row : row + 1]).loss / 2).backward()
        # Some gradients are zero up to rounding (the bias of the keys), so the largest one sets the scale.
        scale = max(value.abs().max().item() for value in expected.values())
        for name, value in gradients(model).items():
            torch.testing.assert_close(value, expected[name], atol=1e-6 * scale, rtol=1e-3)

    def test_trainer_accumulates_without_rescaling_the_loss(self, config, batch, tmp_path):
        rows = [{name: value[row] for name, value in batch.items()} for row in (0, 1)]
        losses = []
        for size, steps in ((2, 1), (1, 2)):
            torch.manual_seed(0)
            model = self.model_class(config)
            model.train = lambda mode=True, model=model: nn.Module.train(model, False)  # no dropout, BatchNorm frozen
            settings = TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=1,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                remove_unused_columns=False,
                label_names=["labels"],
                disable_tqdm=True,
            )
            labels = [{**row, "labels": torch.where(row["labels"] == 255, 0, row["labels"])} for row in rows]
            trainer = Trainer(model=model, args=settings, train_dataset=labels)
            trainer.train()
            losses.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)

    # --- numerics

    @torch.no_grad()
    def test_bfloat16_weights_take_float32_images(self, model, batch):
        expected = model(**batch)
        low = model.to(torch.bfloat16)(**batch)
        assert low.logits.dtype == torch.bfloat16 and low.loss.dtype == torch.float32
        difference = (low.logits.float() - expected.logits).abs().mean() / expected.logits.std()
        assert difference < 0.1

    def test_autocast_trains(self, model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(**batch).loss
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())

    @torch.no_grad()
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
    def test_eager_and_sdpa_attention_agree(self, model, batch, dtype, tolerance):
        model.to(dtype)
        outputs = {}
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            outputs[name] = model(batch["pixel_values"]).logits.float()
        difference = (outputs["eager"] - outputs["sdpa"]).abs().mean() / outputs["eager"].std()
        assert difference < tolerance

    @torch.no_grad()
    def test_channels_last_gives_the_same_logits(self, model, batch):
        expected = model(batch["pixel_values"]).logits
        model.to(memory_format=torch.channels_last)
        found = model(batch["pixel_values"].contiguous(memory_format=torch.channels_last)).logits
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=0)

    # --- use of weights

    def test_offloaded_weights_give_the_same_outputs(self, model, batch, tmp_path):
        weight_use.check_offloading(model, batch["pixel_values"], tmp_path)

    def test_adapters_on_every_layer_learn_and_merge(self, model, batch, tmp_path):
        batch["pixel_values"] = batch["pixel_values"].double()
        weight_use.check_lora(model.double(), batch, tmp_path)

    def test_adapters_of_a_run_learn_merge_and_load(self, model, batch, tmp_path):
        batch["pixel_values"] = batch["pixel_values"].double()
        partial_training.check_adapters(model.double(), batch, tmp_path)

    def test_a_frozen_encoder_stays_as_it_is(self, model, batch):
        partial_training.check_frozen_encoder(model, batch)

    def test_computed_weights_count_as_stored_ones(self, model, batch):
        weight_use.check_parametrized_weights(model.double(), batch["pixel_values"].double())

    @pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
    def test_hooks_of_every_module_with_weights_are_called(self, model, batch, training):
        assert not weight_use.silent_modules(model.train(training), batch)

    # --- compiling and exporting

    def test_compiles_as_one_graph(self, traced_model, batch):
        compiled = torch.compile(traced_model, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        with torch.no_grad():
            expected, found = traced_model(**batch), compiled(**batch)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4 * float(expected.logits.std()), rtol=0)
        torch.testing.assert_close(found.loss, expected.loss)

    @torch.no_grad()
    def test_exports_with_dynamic_batch_height_and_width(self, traced_model):
        if self.pools and not pooling_exports_for_any_size():
            pytest.skip("this release of torch exports pooling for even or for odd sizes only")
        program = Logits(traced_model)
        dynamic = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
        exported = torch.export.export(program, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=dynamic).module()
        for shape in ((1, 3, self.smallest_exported_side, 64), (3, 3, 61, 93), (2, 3, 97, 80)):
            pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            expected = program(pixel_values)
            torch.testing.assert_close(
                exported(pixel_values), expected, atol=1e-4 * float(expected.std()), rtol=0, msg=f"at {shape}"
            )

    @pytest.mark.slow
    @torch.no_grad()
    def test_exports_with_fixed_shapes(self, traced_model, batch):
        """Slow, because export for any size, or any batch, covers almost all of it."""
        program = Logits(traced_model)
        exported = torch.export.export(program, (batch["pixel_values"],)).module()
        expected = program(batch["pixel_values"])
        torch.testing.assert_close(
            exported(batch["pixel_values"]), expected, atol=1e-4 * float(expected.std()), rtol=0
        )

    # --- backbone

    @torch.no_grad()
    def test_backbone_gives_the_chosen_maps(self, config, batch, tmp_path):
        names = config.stage_names
        backbone = AutoBackbone.from_config(self.config_class(**self.tiny, out_features=list(names))).eval()
        assert type(backbone) is self.backbone_class
        outputs = backbone(batch["pixel_values"])
        assert isinstance(outputs.feature_maps, tuple)
        assert [each.shape[1] for each in outputs.feature_maps] == backbone.channels
        assert outputs.hidden_states is None and outputs.attentions is None
        backbone.save_pretrained(tmp_path)
        for choice in (
            {"out_features": [names[1], names[-1]]},
            {"out_indices": [1, len(names) - 1]},
            {"out_indices": [1, -1]},
        ):
            chosen = self.backbone_class.from_pretrained(tmp_path, **choice).eval()
            found = chosen(batch["pixel_values"]).feature_maps
            assert len(found) == 2
            assert_same_outputs(found, (outputs.feature_maps[1], outputs.feature_maps[-1]))

    @torch.no_grad()
    def test_base_model_loads_through_the_auto_class(self, config, batch, tmp_path):
        base = self.base_class(config).eval()
        base.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is self.base_class
        expected, found = base(batch["pixel_values"]), loaded(batch["pixel_values"])
        assert_same_outputs(found.last_hidden_state, expected.last_hidden_state)
