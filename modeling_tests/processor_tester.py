"""Contract of a family's image processors and of the pipeline that uses them."""

import json
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig, PreTrainedModel, pipeline
from transformers.modeling_outputs import SemanticSegmenterOutput

from hf_denseseg.errors import InputError


def random_image(mode: str = "RGB", size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """Random image of any mode; `size` is (width, height), as in PIL."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def rotated_image(path: Any, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Image file whose EXIF orientation asks for a rotation by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    random_image(size=size).save(path, exif=exif)
    return Image.open(path)


class ImageProcessorTester:
    """A subclass names the two processor classes and a tiny model."""

    torchvision_class: type
    pil_class: type
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    tiny: dict[str, Any]

    @pytest.fixture(params=["torchvision", "pil"])
    def processor(self, request: pytest.FixtureRequest) -> Any:
        chosen = self.torchvision_class if request.param == "torchvision" else self.pil_class
        return chosen(size={"shortest_edge": 32, "longest_edge": 64})

    def test_both_backends_agree(self):
        maps = np.random.default_rng(0).integers(0, 7, (60, 90))
        outputs = [
            chosen(size={"height": 32, "width": 48})(
                random_image(size=(90, 60)), segmentation_maps=maps, return_tensors="pt", do_reduce_labels=True
            )
            for chosen in (self.torchvision_class, self.pil_class)
        ]
        difference = (outputs[0]["pixel_values"] - outputs[1]["pixel_values"]).abs()
        assert difference.max() < 0.1 and difference.mean() < 5e-3
        assert torch.equal(outputs[0]["labels"], outputs[1]["labels"])

    def test_values_are_normalized_by_mean_and_deviation_of_imagenet(self, processor):
        pixel_values = processor(random_image(), do_resize=False, return_tensors="pt")["pixel_values"][0]
        values = torch.from_numpy(np.array(random_image())).permute(2, 0, 1) / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        torch.testing.assert_close(pixel_values, (values - mean[:, None, None]) / deviation[:, None, None])

    def test_resize_keeps_the_ratio_up_to_the_longest_edge(self, processor):
        assert processor(random_image(size=(90, 60)), return_tensors="pt")["pixel_values"].shape[-2:] == (32, 48)
        assert max(processor(random_image(size=(300, 20)), return_tensors="pt")["pixel_values"].shape[-2:]) == 64

    def test_labels_follow_the_image_and_reduce_zero_to_ignored(self, processor):
        maps = np.array([[0, 1], [2, 255]], dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        batch = processor(
            random_image(size=(16, 16)), segmentation_maps=maps, do_reduce_labels=True, return_tensors="pt"
        )
        assert batch["labels"].dtype == torch.int64 and batch["labels"].shape == (1, 32, 32)
        corners = batch["labels"][0, [0, 0, -1, -1], [0, -1, 0, -1]]
        assert corners.tolist() == [255, 0, 1, 255]

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
    def test_every_image_mode_becomes_three_channels(self, processor, mode):
        assert processor(random_image(mode), return_tensors="pt")["pixel_values"].shape[1] == 3

    def test_sixteen_bit_is_scaled_by_the_declared_range_and_never_guessed(self, processor):
        channel = np.asarray(random_image())[..., 0]
        deep = Image.fromarray(channel.astype(np.uint16) * 257)
        plain = processor(Image.fromarray(channel), return_tensors="pt")["pixel_values"]
        for given in ("uint16", [0, 65535]):
            found = processor(deep, pixel_range=given, return_tensors="pt")["pixel_values"]
            torch.testing.assert_close(found, plain, atol=0.02, rtol=0)  # bytes are rounded after the resize
        for values in (deep, np.asarray(deep)):
            with pytest.raises(InputError, match="pixel_range is uint8"):
                processor(values, return_tensors="pt")

    @pytest.mark.parametrize("count", [1, 2, 4, 6])
    def test_any_number_of_channels_is_resized_and_normalized_alike(self, processor, count):
        bands = np.random.default_rng(0).integers(0, 256, (60, 90, count), dtype=np.uint8)
        mean, deviation = [0.1 * (k + 1) for k in range(count)], [0.2] * count
        options = {"image_mean": mean, "image_std": deviation, "return_tensors": "pt"}
        together = processor(bands, **options)["pixel_values"]
        assert together.shape == (1, count, 32, 48)
        for k in range(count):
            alone = {**options, "image_mean": [mean[k]] * 3, "image_std": [0.2] * 3}
            expected = processor(bands[..., [k, k, k]], **alone)["pixel_values"][0, 0]
            torch.testing.assert_close(together[0, k], expected)

    def test_exif_rotation_is_applied(self, processor, tmp_path):
        rotated = rotated_image(tmp_path / "rotated.png")
        assert processor(rotated, do_resize=False, return_tensors="pt")["pixel_values"].shape[-2:] == (40, 30)

    def test_arrays_and_tensors_equal_images(self, processor):
        array = np.array(random_image())
        expected = processor(random_image(), return_tensors="pt")["pixel_values"]
        for given in (array, torch.from_numpy(array).permute(2, 0, 1), [array]):
            torch.testing.assert_close(processor(given, return_tensors="pt")["pixel_values"], expected)

    def test_different_sizes_in_one_batch_are_refused_with_a_fix(self, processor):
        with pytest.raises(ValueError, match="different sizes.*'height'"):
            processor([random_image(size=(40, 30)), random_image(size=(30, 40))], return_tensors="pt")
        assert len(processor([random_image(size=(40, 30)), random_image(size=(30, 40))])["pixel_values"]) == 2

    def test_options_are_declared_beside_the_processor(self, processor):
        module, name = sys.modules[type(processor).__module__], f"{self.torchvision_class.__name__}Kwargs"
        declared = getattr(module, name)
        assert type(processor).valid_kwargs is declared
        assert {"do_reduce_labels", "align_corners", "size"} <= declared.__annotations__.keys()

    def test_options_of_a_call_do_not_stay(self, processor):
        before = processor.to_dict()
        processor(random_image(), do_resize=False, image_mean=[0.0, 0.0, 0.0], do_reduce_labels=True)
        assert processor.to_dict() == before

    def test_settings_survive_saving_and_either_backend_loads(self, processor, tmp_path):
        type(processor)(size={"height": 20, "width": 30}, do_normalize=False, align_corners=True).save_pretrained(
            tmp_path
        )
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())["align_corners"] is True
        self.config_class(**self.tiny).save_pretrained(tmp_path)
        for backend, expected in (("torchvision", self.torchvision_class), ("pil", self.pil_class)):
            loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
            assert type(loaded) is expected
            assert (loaded.do_normalize, loaded.align_corners) == (False, True)
            assert loaded(random_image(), return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 30)

    def test_masks_come_at_the_asked_size(self, processor):
        outputs = SemanticSegmenterOutput(logits=torch.randn(2, 4, 8, 10))
        masks = processor.post_process_semantic_segmentation(outputs, target_sizes=[(16, 21), (9, 5)])
        assert [tuple(mask.shape) for mask in masks] == [(16, 21), (9, 5)] and masks[0].dtype == torch.int64
        plain = processor.post_process_semantic_segmentation(outputs)
        assert torch.equal(torch.stack(plain), outputs.logits.argmax(1))
        scored = processor.post_process_semantic_segmentation(outputs, return_segmentation_scores=True)
        assert scored[0].segmentation_scores.shape == (4, 8, 10)
        with pytest.raises(ValueError, match="target sizes"):
            processor.post_process_semantic_segmentation(outputs, target_sizes=[(16, 21)])

    def test_one_logit_is_compared_with_the_threshold(self, processor, tmp_path):
        logits = torch.linspace(-3, 3, 160).view(2, 1, 8, 10)  # none within rounding of a threshold
        outputs = SemanticSegmenterOutput(logits=logits)
        half = processor.post_process_semantic_segmentation(outputs)
        assert torch.equal(torch.stack(half), (logits[:, 0] > 0).long())
        given = processor.post_process_semantic_segmentation(outputs, threshold=0.8)
        assert torch.equal(torch.stack(given), (logits[:, 0].sigmoid() > 0.8).long())
        processor.threshold = 0.2
        processor.save_pretrained(tmp_path)
        loaded = type(processor).from_pretrained(tmp_path)
        masks = loaded.post_process_semantic_segmentation(outputs, target_sizes=[(8, 10)] * 2)
        assert torch.equal(torch.stack(masks), (logits[:, 0].sigmoid() > 0.2).long())
        with pytest.raises(TypeError, match="threshold"):
            processor(random_image(), threshold=0.3)

    def test_reduced_labels_know_the_ignored_id(self, processor):
        image, raw = random_image(size=(4, 2)), np.array([[0, 1, 255, 256], [300, 65535, 2, 0]], np.uint16)
        asked = {"do_reduce_labels": True, "do_resize": False, "return_tensors": "pt"}
        with pytest.raises(InputError, match="holds the id 65535, but 255 marks .* ignore_index=65535"):
            processor(image, raw, **asked)
        wide = type(processor)(ignore_index=65535)
        found = wide(image, raw, **asked)["labels"][0]
        assert found.tolist() == [[65535, 0, 254, 255], [299, 65535, 1, 65535]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_pipeline_masks_have_the_size_of_their_image_and_partition_it(self, dtype, tmp_path):
        self.model_class(self.config_class(**self.tiny, num_labels=5)).save_pretrained(tmp_path)
        self.torchvision_class(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
        segment = pipeline("image-segmentation", model=str(tmp_path), dtype=dtype, device="cpu")
        images = [
            random_image(mode, size=(40 + shift, 30)) for shift, mode in enumerate(("RGB", "L", "RGBA", "P", "CMYK"))
        ]
        images.append(rotated_image(tmp_path / "rotated.png", size=(50, 35)))
        for given, masks in zip(images, segment(images, batch_size=4), strict=True):
            width, height = (35, 50) if given is images[-1] else given.size
            covered = sum((np.asarray(found["mask"]) > 0).astype(int) for found in masks)
            assert covered.shape == (height, width) and (covered == 1).all()
            assert {found["label"] for found in masks} <= {f"LABEL_{k}" for k in range(5)}

    @pytest.mark.parametrize("task", ["image-segmentation", "image-feature-extraction"])
    def test_batches_of_mixed_sizes_equal_single_calls(self, task, tmp_path, caplog):
        torch.manual_seed(0)
        model = self.model_class(self.config_class(**self.tiny, num_labels=5))
        (model if task == "image-segmentation" else model.base_model).save_pretrained(tmp_path)
        self.torchvision_class(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(tmp_path)
        run = pipeline(task, model=str(tmp_path), device="cpu")
        assert "not supported" not in caplog.text
        sizes = ((40, 30), (64, 30), (30, 50), (40, 30), (64, 30))
        images = [random_image(size=size, seed=seed) for seed, size in enumerate(sizes)]
        if task == "image-segmentation":
            for alone, batched in zip([run(image) for image in images], run(images, batch_size=4), strict=True):
                assert [each["label"] for each in batched] == [each["label"] for each in alone]
                for one, other in zip(batched, alone, strict=True):
                    # Rounding in a batch of another size may decide a pixel where two classes are equal.
                    assert one["mask"].size == other["mask"].size
                    assert (np.asarray(one["mask"]) == np.asarray(other["mask"])).mean() > 0.99
            return
        for batch_size in (1, 4):
            batched = run(images, batch_size=batch_size, return_tensors=True)
            for image, found in zip(images, batched, strict=True):
                expected = run(image, return_tensors=True)
                torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=0)
