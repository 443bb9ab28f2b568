"""Contract of models that classify images: subclass `ClassificationModelTester` and name the class."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from closeness import assert_same_outputs
from hf_denseseg.errors import InputError


class ClassificationModelTester:
    """A subclass names the classes; `scores` are the logits whose losses are averaged."""

    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    tiny: dict[str, Any]
    scores: tuple[str, ...] = ("logits",)

    def build(self, **fields: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        return self.model_class(self.config_class(**{**self.tiny, "num_labels": 4, **fields})).eval()

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return self.build()

    @pytest.fixture
    def pixel_values(self) -> torch.Tensor:
        return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))

    def expected(self, outputs: Any, loss: Any, labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([loss(outputs[name], labels) for name in self.scores]).mean()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
    def test_classes_of_any_integer_type(self, model, pixel_values, dtype):
        labels = torch.tensor([1, 3])
        outputs = model(pixel_values, labels=labels.to(dtype))
        torch.testing.assert_close(outputs.loss, self.expected(outputs, F.cross_entropy, labels))

    def test_class_probabilities(self, model, pixel_values):
        mixed = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.2, 0.8]])
        outputs = model(pixel_values, labels=mixed)
        torch.testing.assert_close(outputs.loss, self.expected(outputs, F.cross_entropy, mixed))

    def test_problem_type_chooses_the_loss(self, pixel_values):
        several = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
        for fields, labels, loss in (
            ({"problem_type": "single_label_classification"}, torch.tensor([0, 2]), F.cross_entropy),
            ({"problem_type": "multi_label_classification"}, several, F.binary_cross_entropy_with_logits),
            ({"problem_type": "multi_label_classification"}, several.long(), F.binary_cross_entropy_with_logits),
            ({"problem_type": "regression"}, 3 * several, F.mse_loss),
            ({"problem_type": "regression", "num_labels": 1}, torch.tensor([0.5, -2.0]), F.mse_loss),
            ({"num_labels": 1}, torch.tensor([[3], [1]]), F.mse_loss),
        ):
            outputs = self.build(**fields)(pixel_values, labels=labels)
            if loss is not F.cross_entropy:
                labels = labels.float().view(outputs.logits.shape)
            torch.testing.assert_close(outputs.loss, self.expected(outputs, loss, labels))
            outputs.loss.backward()

    def test_wrong_labels_are_refused(self, model, pixel_values):
        for wrong in (-1, 4):
            with pytest.raises(InputError, match=rf"ids {wrong} that are no class: legal are 0 to 3\."):
                model(pixel_values, labels=torch.tensor([1, wrong]))
        for labels in (torch.ones(2, 1).long(), torch.ones(3).long()):
            with pytest.raises(InputError, match=rf"shape \({len(labels)},.*\(2,\) of an integer type"):
                model(pixel_values, labels=labels)
        with pytest.raises(InputError, match=r"shape \(2,\) hold one number per class; \(2, 4\)"):
            model(pixel_values, labels=torch.ones(2))
        with pytest.raises(InputError, match="a batch of at least one image"):
            model(pixel_values[:0], labels=torch.ones(0).long())

    def test_compiles_with_labels(self, model, pixel_values):
        labels = torch.tensor([1, 3])
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch._dynamo.reset()
        with torch.no_grad():
            assert_same_outputs(compiled(pixel_values, labels=labels).loss, model(pixel_values, labels=labels).loss)
