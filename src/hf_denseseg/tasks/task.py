"""What a task says of itself, so that one road leads from its recipe to its report."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_denseseg.data.checks import Fault
from hf_denseseg.recipe import Recipe
from hf_denseseg.recipe_keys import DataArguments
from hf_denseseg.training import TaskTrainer

SHOWN_PICTURES = 6


def spread(count: int, shown: int = SHOWN_PICTURES) -> list[int]:
    """Numbers of `shown` pictures, spread over all: neighbours are often frames of one video."""
    shown = min(shown, count)
    return [place * count // shown for place in range(shown)]


class Task(ABC):
    """One kind of output that a model learns.

    Attributes:
        name: word in the recipe.
        pipeline: name of the pipeline of transformers, and task on the model card.
        verb, found: how the card's example calls the pipeline, and what it prints of each thing found.
        metrics: key in the scores -> label of a fraction; the first is the one that counts.
        metric_types: key in the scores -> word of the hub for it, where it is another.
        scored_at: what the scores are counted over.
        columns: key in a row of the per-class table -> label of a fraction; the first is drawn as a bar.
        counted: key in a row of the per-class table that is a number of things, and its label.
        shown: what the pictures of the report show.
        published, measured: keys of the figures in the card of a variant, of the paper and of a run.
        figures, measured_heading: what the card of a variant says of these figures.
        counted_size: (height, width) at which the card of a variant counts multiply-adds.
        usual_labels: number of classes in the card's example.
    """

    name: str
    pipeline: str
    verb: str
    found: str
    metrics: dict[str, str]
    metric_types: dict[str, str] = {}
    scored_at: str
    columns: dict[str, str]
    counted: tuple[str, str]
    shown: str
    published: tuple[str, ...]
    measured: tuple[str, ...]
    figures: str
    measured_heading: str = "measured"
    counted_size: tuple[int, int]
    usual_labels: int

    @abstractmethod
    def load(self, arguments: DataArguments, part: str) -> Any:
        """Load the data of `part`, `"train"` or `"eval"`: something with `dataset` and `spec`."""

    @abstractmethod
    def check(self, data: Any, limit: int | None) -> list[Fault]:
        """Look through so many rows, spread over the whole, and list what is wrong with them."""

    @abstractmethod
    def processor_options(self, arguments: DataArguments) -> dict[str, Any]:
        """What the test keys of a recipe mean for the image processor."""

    @abstractmethod
    def build_trainer(
        self, recipe: Recipe, model: PreTrainedModel, processor: Any, eval_data: Any, train_data: Any = None
    ) -> TaskTrainer:
        """Join model, data and recipe."""

    @abstractmethod
    def chance(self, scores: dict[str, Any]) -> str:
        """A sentence on what an answer without looking would score."""

    @abstractmethod
    def protocol_name(self, protocol: dict[str, Any]) -> str:
        """The test protocol in a few words."""

    @abstractmethod
    def draw_results(self, trainer: Any, path: Path) -> None:
        """Draw some pictures with truth and answer into a file."""

    def use_protocol_of(self, trainer: Any, checkpoint: str) -> None:  # noqa: B027 (nothing to do in most tasks)
        """Test as the checkpoint says, as far as its image processor does not."""

    def columns_of(self, scores: dict[str, Any]) -> dict[str, str]:
        """The columns of the per-class table that these scores hold."""
        rows = scores["per_class"]
        return {key: label for key, label in self.columns.items() if not rows or key in rows[0]}
