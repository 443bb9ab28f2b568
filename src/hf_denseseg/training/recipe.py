"""Recipes: one flat YAML file per published result, checked key by key, overridable on the command line."""

import logging
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.peers import PEERS
from hf_denseseg.models.auto.registration import list_models
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION, TASKS
from hf_denseseg.training.arguments import RENAMED_KEYS, ModelArguments, TaskTrainingArguments
from hf_denseseg.training.data_arguments import DataArguments
from hf_denseseg.training.key_checks import check_training_values, refuse_unused_keys
from hf_denseseg.training.tasks import get_task
from hf_denseseg.training.tasks.task import Task

logger = logging.getLogger(__name__)

LARGEST_FILE, MOST_BRACKETS = 1 << 20, 1000  # bytes, opening ones
OF_ONE_MODEL = ("config_overrides", "encoder_weights", "published")  # keys of a recipe about its own model
ARGUMENT_CLASSES: tuple[Any, ...] = (ModelArguments, DataArguments, TaskTrainingArguments)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: model, data and training.

    Args:
        task: that is trained.
        model: its keys.
        data: its keys.
        training: its keys.
        given: the keys that the file or the command line sets.
        comments: key -> comment above it in the file.
    """

    task: Task
    model: ModelArguments
    data: DataArguments
    training: TaskTrainingArguments
    given: dict[str, Any]
    comments: Mapping[str, str] = field(default_factory=dict)

    def to_yaml(self) -> str:
        """The given keys as YAML, which `load_recipe` reads back to an equal recipe."""
        if not self.comments:
            return yaml.safe_dump(self.given, sort_keys=False)
        lines = []
        for key, value in self.given.items():
            text = yaml.safe_dump(value, sort_keys=False, default_flow_style=True, width=100).removesuffix("...\n")
            comment = f"# {self.comments[key]}\n" if key in self.comments else ""
            lines.append(f"{comment}{key}: {text.rstrip()}\n")
        return "".join(lines)


def recipe_fields() -> dict[str, tuple[Any, Any]]:
    """Every key a recipe may hold: key -> (argument class, type)."""
    return {
        name: (owner, annotation)
        for owner in ARGUMENT_CLASSES
        for name, annotation in typing.get_type_hints(owner).items()
        if name in owner.__dataclass_fields__ and owner.__dataclass_fields__[name].init
    }


def load_recipe(path: str | Path | None, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe file and the command-line overrides that follow it.

    Args:
        path: YAML file, or None for the defaults alone.
        overrides: words such as `["--max_steps", "100", "--crop_size", "256", "256"]`, which override the file.

    Returns:
        A `Recipe`: the keys, checked and in groups.

    Raises:
        InputError: no such file, not a mapping, a key that does not exist (the nearest one is proposed), a key that
            belongs to another task, or a value of the wrong type.
    """
    given = {} if path is None else read_yaml(Path(path))
    given = _without_other_model(given, parse_overrides(overrides or []))
    given.setdefault("output_dir", f"runs/{Path(path).stem}" if path else "runs/default")
    return make_recipe(given, f"Recipe {path or 'from the command line'}")


def make_recipe(given: dict[str, Any], where: str, comments: Mapping[str, str] | None = None) -> Recipe:
    """Check keys and build the recipe.

    Args:
        given: key -> value.
        where: where the keys are from, for messages.
        comments: see `Recipe`.

    Returns:
        A `Recipe`.

    Raises:
        InputError: see `load_recipe`.
    """
    _check_task(given, where)
    refuse_unused_keys(given)
    fields = recipe_fields()
    try:
        model, data, training = (
            owner(**{key: value for key, value in given.items() if fields[key][0] is owner})
            for owner in ARGUMENT_CLASSES
        )
    # What transformers raises on a wrong value, on purpose or not.
    except (ValueError, TypeError, ImportError, OSError, LookupError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{where}: {error}") from error
    task = get_task(model.task)
    task.check_keys(data)
    check_training_values(given, training, task.name)
    return Recipe(task, model, data, training, given, comments or {})


def _without_other_model(given: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The keys of a file and those that override them; of another model by name, the file says nothing."""
    named = overrides.get("model")
    if named != given.get("model") and (named in PEERS or named in list_models()):
        others = [key for key in OF_ONE_MODEL if key in given and key not in overrides]
        if others:
            logger.info("Of the recipe, %s are left out: they belong to %s.", ", ".join(others), given.get("model"))
        given = {key: value for key, value in given.items() if key not in others}
    return given | overrides


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Turn `--key value [value ...]` into a dictionary; values are read as YAML, a bare `--flag` is true.

    Raises:
        InputError: a word without its `--key`, an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, _, rest = word[2:].partition("=")
            key = key.replace("-", "_")
            values[key] = [rest] if rest else []
        elif key is None:
            raise InputError(f"{word!r} has no key: write `--key value`, for example `--max_steps 100`.")
        else:
            values[key].append(word)
    fields = recipe_fields()
    parsed = {name: _parse_words(fields[name][1] if name in fields else None, parts) for name, parts in values.items()}
    _check(parsed, "Command line")
    return parsed


def _parse_words(annotation: Any, words: list[str]) -> Any:
    if not words:
        return True
    kinds = _kinds(annotation)
    parsed = [yaml.safe_load(word) for word in words]
    # YAML reads 1e-4 as text and no as false; on a command line the key tells what is meant.
    parsed = [_as_number(value) if {float, list} & kinds else value for value in parsed]
    if str in kinds and list not in kinds:
        parsed = [value if type(value) in kinds else word for value, word in zip(parsed, words, strict=True)]
    several = len(parsed) > 1 or (list in kinds and str not in kinds and not isinstance(parsed[0], list))
    return parsed if several else parsed[0]


def _as_number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a recipe file, which exist and have values of their types.

    Raises:
        InputError: see `load_recipe`.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise InputError(
                f"Recipe {path} has {path.stat().st_size:,} bytes; a recipe is a few dozen `key: value` lines."
            )
        text = path.read_text(encoding="utf-8")
        if sum(text.count(bracket) for bracket in "[{") > MOST_BRACKETS:  # PyYAML takes time quadratic in them
            raise InputError(
                f"Recipe {path} holds more than {MOST_BRACKETS:,} brackets; the lists of a recipe are short."
            )
        # Nested aliases (a "YAML bomb") are a few bytes here, and gigabytes as soon as they are printed.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise InputError(f"Recipe {path} has an alias (*name): write the value out.")
        content = yaml.safe_load(text)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(
            f"No recipe at {path}. Give the path of a YAML file; those of the papers are in scripts/recipes."
        ) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"Recipe {path} is not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"Recipe {path} has no `key: value` lines.")
    _check(content, f"Recipe {path}")
    return content


def _check(values: dict[str, Any], where: str) -> None:
    fields = recipe_fields()
    for key, value in values.items():
        if key in RENAMED_KEYS:
            raise InputError(f"{where}: {key} has another name now. Did you mean {RENAMED_KEYS[key]!r}?")
        if key not in fields:
            hint = unknown_name("key", str(key), fields, otherwise="`denseseg train --keys` lists the keys.")
            raise InputError(f"{where}: {hint}")
        kinds = _kinds(fields[key][1])
        allowed = tuple(kinds | {int} if float in kinds else kinds)
        # bool is an int in Python, but `max_steps: true` is a mistake.
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(sorted(kind.__name__ for kind in kinds - {type(None)}))
            hint = " Write numbers with a dot: 1.0e-4." if float in kinds and isinstance(value, str) else ""
            hint = " YAML reads yes and no as true and false: quote them." if isinstance(value, bool) else hint
            raise InputError(f"{where}: {key} must be {names}, but is {_shown(value)} ({type(value).__name__}).{hint}")
        inner = _kinds_in_list(fields[key][1])
        for part in value if isinstance(value, list) and inner else ():
            if not isinstance(part, tuple(inner | {int} if float in inner else inner)) or isinstance(part, bool):
                names = " or ".join(sorted(kind.__name__ for kind in inner))
                raise InputError(f"{where}: {key} must hold {names}, but holds {_shown(part)}.")
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, float) and not math.isfinite(part):
                raise InputError(f"{where}: {key} must be a finite number, but is {part}.")


def _check_task(given: dict[str, Any], where: str) -> None:
    """Refuse an unknown task, and keys that have no meaning in the given one."""
    task = given.get("task", SEMANTIC_SEGMENTATION)
    if task not in TASKS:
        raise InputError(f"{where}: {unknown_name('task', str(task), TASKS)}")
    fields = recipe_fields()
    for key in given:
        tasks = fields[key][0].__dataclass_fields__[key].metadata.get("tasks", TASKS)
        if task not in tasks:
            meaning = fields[key][0].__dataclass_fields__[key].metadata["help"]
            raise InputError(
                f"{where}: {key} ({meaning}) has no meaning in the task {task}; it belongs to {' and '.join(tasks)}. "
                "Remove it, or change `task`."
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _kinds_in_list(annotation: Any) -> set[type]:
    """Plain Python types allowed for the elements of a list field; empty if there is no list, or any type is."""
    parts = [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        parts = list(typing.get_args(annotation))
    return set().union(
        *(_kinds(inner) for part in parts if typing.get_origin(part) is list for inner in typing.get_args(part))
    )


def _kinds(annotation: Any) -> set[type]:
    """Plain Python types that a field annotation accepts."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Literal:
        return {type(choice) for choice in typing.get_args(annotation)}
    plain = typing.get_origin(annotation) or annotation
    # Enumerations and nested dataclasses of transformers are given by name.
    return {plain} if plain in (bool, int, float, str, list, dict, type(None)) else {str}
