"""The interface of a task, by which all tasks run from recipe to report in the same way."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel

from hf_denseseg.data.checks.proposal import Proposal
from hf_denseseg.data.reading.images import Fault
from hf_denseseg.errors import InputError
from hf_denseseg.training.arguments import TaskTrainingArguments
from hf_denseseg.training.data_arguments import DataArguments
from hf_denseseg.training.trainer import TaskTrainer

SHOWN_IMAGES = 6


class Inspection(NamedTuple):
    """Result of reading a dataset.

    Args:
        faults: samples that cannot be used.
        notes: what is unusual, but may be intended.
        images: number of readable images.
        table: counts as lines of text.
        statistics: the same as JSON values.
        proposal: a label specification that fits the files better, if there is one.
    """

    faults: list[Fault]
    notes: list[str]
    images: int
    table: str
    statistics: dict[str, Any]
    proposal: Proposal | None = None


def table_of(heads: Sequence[str], rows: Iterable[Sequence[Any]], sizes: Counter) -> str:
    """A table of names and numbers, with the most common (height, width) of the images below it."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(head), *(len(row[k]) for row in cells)]) + 2 for k, head in enumerate(heads)]
    lines = [
        "".join(f"{cell:<{widths[0]}}" if not k else f"{cell:>{widths[k]}}" for k, cell in enumerate(row))
        for row in [list(heads), *cells]
    ]
    return "\n".join([*lines, sizes_of(sizes)])


def sizes_of(sizes: Counter) -> str:
    """The most common (height, width) of images as a line of text."""
    common = ", ".join(f"{height}x{width}: {count}" for (height, width), count in sizes.most_common(6))
    return f"sizes (height x width: images): {common or 'none'}"


def sizes_as_json(sizes: Counter) -> dict[str, int]:
    """`"{height}x{width}"` -> number of images."""
    return {f"{height}x{width}": count for (height, width), count in sizes.most_common()}


def spread(count: int, shown: int = SHOWN_IMAGES) -> list[int]:
    """Indices of `shown` images, spread evenly: neighboring images are often frames of one video."""
    shown = min(shown, count)
    return [number * count // shown for number in range(shown)]


class Task(ABC):
    """One kind of output that a model learns.

    Attributes:
        name: value of the recipe's key `task`, a key of `TASKS`.
        examples: what a dataset consists of, in messages.
        source_options: options of a dataset besides its name and split.
    """

    name: str
    examples: str = "images"
    source_options: tuple[str, ...] = ()

    def check_keys(self, data: DataArguments) -> None:  # noqa: B027 (most tasks have no more to check)
        """Refuse keys of a recipe that contradict each other, before anything is loaded."""

    @abstractmethod
    def load(self, arguments: DataArguments, part: str) -> Any:
        """Load the data of `part`, `"train"` or `"eval"`, as an object with `dataset` and `spec`."""

    @abstractmethod
    def load_split(self, name: str, split: str, limit: int | None, **source: Any) -> Any:
        """Load a split of a dataset by its name; arguments as for `inspect`, result as for `load`."""

    @abstractmethod
    def check(self, data: Any, limit: int | None) -> list[Fault]:
        """Check at most `limit` rows, spread over the dataset, and list their faults."""

    @abstractmethod
    def inspect(self, name: str, split: str, limit: int | None, **source: Any) -> Inspection:
        """Read a split of a dataset and count its content; `source` holds values of `source_options`."""

    @abstractmethod
    def show(self, name: str, split: str, limit: int, **source: Any) -> Image.Image:
        """Draw the first images of a dataset with their labels; arguments as for `inspect`."""

    @abstractmethod
    def processor_options(self, arguments: DataArguments) -> dict[str, Any]:
        """Options of the image processor for the test keys of a recipe."""

    @abstractmethod
    def build_trainer(
        self,
        data: DataArguments,
        args: TaskTrainingArguments,
        model: PreTrainedModel,
        processor: BaseImageProcessor,
        eval_data: Any,
        train_data: Any = None,
    ) -> TaskTrainer:
        """Build the trainer from model, data and the keys of a recipe."""

    @abstractmethod
    def draw_results(self, trainer: Any) -> Image.Image:
        """Draw some images with ground truth and prediction."""

    def write_evaluation(  # noqa: B027 (most tasks leave results.json alone)
        self, trainer: Any, results: dict[str, Any], output: Path
    ) -> None:
        """Write the files of an evaluation besides `results.json`."""

    def rank_doubts(self, trainer: Any, min_pixels: int) -> None:
        """Rank the labels that a model contradicts.

        Raises:
            InputError: the task has no label maps.
        """
        raise InputError(
            f"Doubtful labels are found in label maps; this checkpoint is for {self.name}. Give one for "
            "semantic-segmentation."
        )

    def use_class_order(self, trainer: Any, order: list[int]) -> None:
        """Let a trainer score a model whose classes have another order: train id of each of its outputs.

        Raises:
            InputError: the task does not support it.
        """
        raise InputError(
            f"The checkpoint has the classes of the dataset in another order, which the task {self.name} does not "
            "support. Give the classes of the dataset in the order of the checkpoint."
        )

    def use_protocol_of(self, trainer: Any, checkpoint: str) -> None:  # noqa: B027 (nothing to do in most tasks)
        """Use the checkpoint's test protocol, as far as its image processor does not define it already."""
