"""The tests that both detectors of HLG must pass: subclass `DetectionModelTester` and name the class."""

import copy
import functools
from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection, PreTrainedModel, Trainer, TrainingArguments, pipeline
from transformers.modeling_layers import GradientCheckpointingLayer

from closeness import assert_same_outputs
from hf_denseseg import HlgConfig, HlgForImageClassification, HlgImageProcessor
from hf_denseseg.errors import InputError
from hf_denseseg.models.hlg import modeling_hlg_detection as detection
from model_tester import freeze_batch_norm, gradients
from processor_tester import random_image

NUM_LABELS = 5
TINY = {
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
    "pyramid_hidden_size": 32,
    "region_hidden_sizes": [64, 32],
}


def labels_of(boxes: list, classes: list, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Labels whose masks fill the boxes, which are normalized (center x, center y, width, height)."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x, y, width, height) in zip(masks, boxes, strict=True):
        rows = slice(round((y - height / 2) * size[0]), round((y + height / 2) * size[0]))
        mask[rows, round((x - width / 2) * size[1]) : round((x + width / 2) * size[1])] = True
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "masks": masks,
    }


EMPTY = labels_of([], [], (96, 128))
# No two anchors overlap one of these exactly alike, or rounding would decide which of them is the best match.
TWO = labels_of([[0.513, 0.487, 0.31, 0.43], [0.211, 0.317, 0.19, 0.27]], [1, 4], (96, 128))


def few_regions(patch: pytest.MonkeyPatch) -> None:
    """Let Mask R-CNN process fewer regions than the published numbers, which take seconds per image."""
    sampler = detection.BalancedPositiveNegativeSampler
    patch.setattr(
        detection, "BalancedPositiveNegativeSampler", lambda count, fraction: sampler(min(count, 48), fraction)
    )
    for name in ("pre_nms_top_n", "post_nms_top_n"):
        patch.setattr(detection.HlgRegionProposals, name, lambda self: 100 if self.training else 24)


@functools.cache
def built(tester: "type[DetectionModelTester]") -> tuple[PreTrainedModel, torch.Tensor]:
    """The model of these tests, whose weights take long to draw, and the state of the random numbers behind it."""
    torch.manual_seed(0)
    model = tester.model_class(HlgConfig(**TINY, num_labels=NUM_LABELS, drop_path_rate=0.0)).eval()
    tester().make_decided(model)
    return model, torch.get_rng_state()


class DetectionModelTester(ABC):
    """Contract of a detector; a subclass names the class and adds its own tests."""

    model_class: type[PreTrainedModel]
    predictions: tuple[str, ...]
    steps = 120  # of training, after which it finds four objects
    bfloat16_size = (48, 64)

    @pytest.fixture
    def config(self) -> HlgConfig:
        return HlgConfig(**TINY, num_labels=NUM_LABELS, drop_path_rate=0.0)

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        model, state = built(type(self))
        torch.set_rng_state(state)
        return copy.deepcopy(model)

    @abstractmethod
    def make_decided(self, model: PreTrainedModel) -> None:
        """Spread scores and boxes, which are nearly equal in a fresh model."""

    @pytest.fixture
    def batch(self) -> dict[str, Any]:
        pixel_values = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixel_values, "labels": [TWO, EMPTY]}

    def same(self, found: Any, expected: Any, tolerance: float = 1e-4) -> None:
        for name in self.predictions:
            torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=tolerance)

    @torch.no_grad()
    def test_saved_model_gives_the_same_through_the_auto_class(self, model, batch, tmp_path):
        model.save_pretrained(tmp_path)
        loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
        assert type(loaded) is self.model_class
        expected, found = model(batch["pixel_values"]), loaded(batch["pixel_values"])
        for name in self.predictions:
            assert_same_outputs(found[name], expected[name], name)

    def test_backbone_of_a_classifier_loads_and_the_rest_starts_fresh(self, config, tmp_path):
        classifier = HlgForImageClassification(HlgConfig(**TINY, num_labels=7, normalize_stages=False))
        classifier.save_pretrained(tmp_path)
        model, report = self.model_class.from_pretrained(
            tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        state = model.state_dict()
        pretrained = {name: value for name, value in classifier.state_dict().items() if name.startswith("hlg.")}
        shared = [name for name in pretrained if name in state and ".layernorms." not in name]
        assert len(shared) > 100 and all(torch.equal(state[name], pretrained[name]) for name in shared)
        new = {name for name in report["missing_keys"] if name.startswith("hlg.")}
        assert all(".layernorms." in name for name in new)

    def test_missing_weights_are_initialized_exactly_as_by_the_constructor(self, config, monkeypatch):
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
    @pytest.mark.parametrize("size", [(4, 4), (33, 65), (61, 130)])
    def test_any_size_gives_finite_predictions(self, model, size):
        outputs = model(torch.randn(1, 3, *size))
        assert all(outputs[name].isfinite().all() for name in self.predictions)

    @torch.no_grad()
    def test_padding_in_a_batch_changes_nothing(self, model):
        """HLG attends across the complete map, so this does not come by itself."""
        large, small = torch.randn(3, 96, 128), torch.randn(3, 50, 60)
        batch, mask = torch.zeros(2, 3, 96, 128), torch.zeros(2, 96, 128, dtype=torch.int64)
        batch[0], mask[0] = large, 1
        batch[1, :, :50, :60], mask[1, :50, :60] = small, 1
        together = model(batch, pixel_mask=mask)
        for index, image in enumerate((large, small)):
            alone = model(image[None])
            for name in self.predictions:
                length = alone[name].shape[1]
                found = together[name][index : index + 1, :length]
                torch.testing.assert_close(found, alone[name], atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_tuple_and_named_output_agree(self, model, batch):
        torch.manual_seed(0)
        named = model(**batch)
        torch.manual_seed(0)
        plain = model(**batch, return_dict=False)
        assert_same_outputs(plain[0], named.loss)
        assert len(plain) == len(named.to_tuple())
        assert plain[1].keys() == named.loss_dict.keys()

    @torch.no_grad()
    def test_hidden_states_of_the_backbone_come_on_request(self, model, batch):
        assert model(batch["pixel_values"]).hidden_states is None
        outputs = model(batch["pixel_values"], output_hidden_states=True)
        assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1

    # --- training

    @pytest.mark.parametrize("labels", [[TWO, EMPTY], [EMPTY, EMPTY]], ids=["one empty", "both empty"])
    def test_every_parameter_gets_a_finite_gradient_also_without_objects(self, model, batch, labels):
        """Otherwise distributed training would hang."""
        outputs = model.train()(batch["pixel_values"], labels=labels)
        outputs.loss.backward()
        torch.testing.assert_close(outputs.loss, sum(outputs.loss_dict.values()))
        assert outputs.loss.isfinite()
        found = gradients(model)
        missing = [name for name, each in model.named_parameters() if each.requires_grad and name not in found]
        assert not missing, f"no gradient reaches {missing[:5]}"
        assert all(value.isfinite().all() for value in found.values())

    def test_loss_also_comes_in_eval_mode(self, model, batch):
        outputs = model(**batch)
        assert outputs.loss.isfinite() and all(outputs[name] is not None for name in self.predictions)

    def test_gradient_checkpointing_changes_nothing(self, model, batch):
        model.train()
        freeze_batch_norm(model)
        other = copy.deepcopy(model)
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert any(
            each.gradient_checkpointing for each in other.modules() if isinstance(each, GradientCheckpointingLayer)
        )
        for each in (model, other):
            torch.manual_seed(0)
            each(**batch).loss.backward()
        expected, found = gradients(model), gradients(other)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3)

    def test_bfloat16_weights_and_autocast_train_with_losses_in_float32(self, model):
        """On small images: where a processor has no instructions for it, bfloat16 takes many times as long."""
        size = self.bfloat16_size
        two = labels_of(TWO["boxes"].tolist(), [1, 4], size)
        batch = {"pixel_values": torch.randn(2, 3, *size), "labels": [two, labels_of([], [], size)]}
        low = copy.deepcopy(model).to(torch.bfloat16).train()
        losses = [low(**batch).loss]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model.train()(**batch).loss)
        for loss in losses:
            assert loss.dtype == torch.float32 and loss.isfinite()
            loss.backward()
        assert all(value.isfinite().all() for each in (low, model) for value in gradients(each).values())

    def test_trainer_takes_steps_and_evaluates(self, model, batch, tmp_path):
        assert model.accepts_loss_kwargs is False
        rows = [{"pixel_values": batch["pixel_values"][index], "labels": batch["labels"][index]} for index in (0, 1)]

        def collate(rows):
            return {
                "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
                "labels": [row["labels"] for row in rows],
            }

        settings = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            prediction_loss_only=True,
        )
        trainer = Trainer(model, settings, data_collator=collate, train_dataset=rows, eval_dataset=rows)
        assert trainer.train().training_loss > 0
        assert trainer.evaluate()["eval_loss"] > 0

    def test_pipeline_batches_of_mixed_sizes_equal_single_calls(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        task = HlgImageProcessor.task_of(model.config)
        HlgImageProcessor(task=task, size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
        detect = pipeline("object-detection", model=str(tmp_path), device="cpu")
        images = [random_image(size=size, seed=seed) for seed, size in enumerate(((40, 30), (64, 30), (40, 30)))]
        for image, found in zip(images, detect(images, batch_size=3, threshold=0.0), strict=True):
            alone = detect(image, threshold=0.0)
            assert len(found) == len(alone) > 0
            assert [each["score"] for each in found] == pytest.approx([each["score"] for each in alone], rel=1e-3)

    # --- bad input

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                {"class_labels": torch.tensor([1, NUM_LABELS])},
                rf"Image 1.*class {NUM_LABELS}; .*0 to {NUM_LABELS - 1}",
            ),
            ({"class_labels": torch.tensor([-1, 0])}, "Image 1.*class -1"),
            ({"class_labels": torch.tensor([1])}, r"image 1 do not belong together.*\(1,\)"),
            ({"boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4], [0.2, 0.3, 0.0, 0.2]])}, "Image 1 has the box"),
            ({"boxes": torch.tensor([[0.5, 0.5, 0.3, torch.nan], [0.2, 0.3, 0.1, 0.2]])}, "Image 1.*nan"),
            ({"boxes": torch.tensor([[0.9, 0.5, 0.3, 0.4], [0.2, 0.3, 0.1, 0.2]])}, "Clip boxes at the border"),
            ({"boxes": torch.tensor([[1.0004, 0.5, 0.0004, 0.4], [0.2, 0.3, 0.1, 0.2]])}, "Image 1 has the box"),
            ({"boxes": torch.tensor([[30.0, 20.0, 50.0, 60.0], [0.2, 0.3, 0.1, 0.2]])}, "as fractions of its width"),
        ],
    )
    def test_impossible_labels_are_refused_with_image_and_fix(self, model, batch, change, message):
        with pytest.raises(InputError, match=message):
            model(batch["pixel_values"], labels=[EMPTY, {**TWO, **change}])

    def test_other_wrong_input_is_refused(self, model, batch):
        pixel_values = batch["pixel_values"]
        for wrong in (pixel_values[:0], pixel_values[0]):
            with pytest.raises(InputError, match="a batch of at least one image"):
                model(wrong, labels=[])
        with pytest.raises(InputError, match="1 labels were given for 2"):
            model(pixel_values, labels=[EMPTY])
        with pytest.raises(InputError, match="image 0 lack 'boxes'"):
            model(pixel_values, labels=[{name: EMPTY[name] for name in ("class_labels", "masks")}] * 2)
        with pytest.raises(InputError, match=r"\(2, 8, 8\).*\(2, 96, 128\)"):
            model(pixel_values, pixel_mask=torch.ones(2, 8, 8))
        mask = torch.ones(2, 96, 128)
        mask[1, :10] = 0  # padding at the top
        with pytest.raises(InputError, match="image 1 is no rectangle"):
            model(pixel_values, pixel_mask=mask)

    @pytest.mark.slow
    def test_overfits_synthetic_images(self, config):
        """Four rectangles of four colors on two images: found at the right place with the right class."""
        torch.manual_seed(0)
        colors = torch.tensor([[2.0, -2, -2], [-2, 2, -2], [-2, -2, 2], [2, 2, -2]])
        boxes = [[[0.25, 0.3, 0.3, 0.35], [0.7, 0.65, 0.4, 0.3]], [[0.6, 0.3, 0.35, 0.4], [0.25, 0.7, 0.3, 0.3]]]
        images, labels = torch.zeros(2, 3, 96, 128), []
        for image, (own, classes) in zip(images, zip(boxes, ([0, 1], [2, 3]), strict=True), strict=True):
            labels.append(labels_of(own, classes, (96, 128)))
            for mask, name in zip(labels[-1]["masks"], classes, strict=True):
                image[:, mask] = colors[name][:, None]
        config.pyramid_hidden_size, config.region_hidden_sizes = 256, [1024, 256]  # the tiny widths learn too slowly
        model = self.model_class(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=self.steps)
        for _ in range(self.steps):
            optimizer.zero_grad()
            model(images, labels=labels).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        freeze_batch_norm(model)
        self.check_learned(model.eval(), images, labels)

    @abstractmethod
    def check_learned(self, model: PreTrainedModel, images: torch.Tensor, labels: list) -> None:
        """Fail unless the model, in eval mode, finds the objects of the labels."""
