"""Find the files of a benchmark in a folder; errors say which are missing and where to get them."""

from pathlib import Path

import numpy as np

from hf_denseseg.data.reading.archives import Tree, open_tree
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.reading.references import describe_reference, is_reference, read_reference
from hf_denseseg.data.reading.run_lengths import read_merged
from hf_denseseg.data.sources.benchmarks.layouts import NAMES, Benchmark, Split, get_benchmark
from hf_denseseg.data.sources.folders import Listing, Pairs, has_pairs
from hf_denseseg.data.sources.official import (
    ROOT_VARIABLE,
    fetch_text,
    format_description,
    official_trees,
    source_text,
)
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError

FETCH_NOTE = f"""Nothing is downloaded: download the archives yourself; they may stay packed. Set data_root (or the
environment variable {ROOT_VARIABLE}) to their folder or its parent."""
_MERGED_LIMIT = 2**31  # bytes of trainval_merged.json, which also contains parts, boundaries and occlusions


def open_benchmark(name: str, root: str | Path | None = None) -> tuple[Benchmark, Tree]:
    """Find the files of a benchmark given by name.

    Args:
        name: one of `NAMES`.
        root: folder or archive with the official files, or its parent folder; when None, the environment variable
            DENSESEG_DATA_ROOT is used, then the current folder.

    Raises:
        InputError: the files are missing; the message lists them and says where to get them.
    """
    benchmark = get_benchmark(name)
    for tree in official_trees(name, root, benchmark.folders, benchmark.archives):
        if _is_here(benchmark, tree):
            return benchmark, tree
    spec, files = benchmark.spec, ", ".join(benchmark.archives)
    pairs = " It is a folder of image-label pairs; use it as the dataset." if root and has_pairs(Path(root)) else ""
    raise InputError(fetch_text(name, root, spec.source_url, spec.license, files) + pairs)


def recognize(path: Path, chosen: str = "") -> tuple[Benchmark, Tree] | None:
    """Recognize the benchmark in a folder or archive by its file names; None if there is none.

    Args:
        path: folder or archive.
        chosen: name of the benchmark to use if there are several.

    Raises:
        InputError: the files match several benchmarks, and `chosen` is none of them.
    """
    known = [get_benchmark(name) for name in NAMES]
    tree = open_tree(path, tuple(pattern for each in known for pattern in each.archives))
    found = [each for each in known if _is_here(each, tree)]
    found = [each for each in found if each.name == chosen] or found
    if len(found) > 1:
        names = [each.name for each in found]
        raise InputError(
            f"{path} may be {' or '.join(names)}: it has the files of each. Give the name as the dataset "
            f"and the folder as data_root, such as `--dataset {names[0]} --data_root {path}`."
        )
    return (found[0], tree) if found else None


def list_split(benchmark: Benchmark, tree: Tree, split: str) -> Listing:
    """List the images and label maps of a split.

    Raises:
        InputError: the split does not exist, or some of its files are missing.
    """
    name = resolve_split(split, sorted(benchmark.splits), benchmark.name)
    files = benchmark.splits[name]
    where = f"{benchmark.name}, split {name}, in {tree.root}"
    members = _members(files, tree, where)
    images = _by_id(benchmark, tree, files.images)
    if not images:
        raise InputError(f"{where}: no images ({files.images}). {describe_source(benchmark)}")
    labels, key = _labels(benchmark, tree, files, where)
    if members is None and files.holds:
        members = {each for each in (*images, *labels) if files.holds(each)}
    notes: list[str] = []
    if members is not None:
        images, labels = ({each: found[each] for each in found if each in members} for found in (images, labels))
        if missing := sorted(members - set(images)):
            raise InputError(
                f"{where}: {len(missing)} images are missing, first {missing[0]}. {_how_to_complete(benchmark)}"
            )
    for each in benchmark.damaged:
        if each in images and (wrong := _damage(images[each])):
            notes.append(f"{where}: {each} is left out: it is damaged in the official archive ({wrong}).")
            del images[each]
            labels.pop(each, None)
    if not images:
        raise InputError(f"{where}: none of the images found belongs to this split. {_how_to_complete(benchmark)}")
    if len(images) + len(notes) < files.size:
        notes.append(f"{where} is a partial copy: it has {len(images):,} of {files.size:,} images.")
    elif len(images) > files.size:
        notes.append(f"{where}: {len(images):,} images, but {files.size:,} were published.")
    places = files.images, " or ".join(pattern for pattern, _ in files.labels)
    spec = benchmark.encodings[key] if key else benchmark.spec
    return Listing(Pairs(images, labels, *places), spec, notes, bool(files.labels))


def describe_source(benchmark: Benchmark) -> str:
    """How to get the data: source, license and expected files."""
    return source_text(benchmark.spec.source_url, benchmark.spec.license, ", ".join(benchmark.archives))


def _how_to_complete(benchmark: Benchmark) -> str:
    return f"Complete the copy from {benchmark.spec.source_url}."


def _is_here(benchmark: Benchmark, tree: Tree) -> bool:
    """Whether the tree has images, and labels if any were published, of at least one split."""
    return any(
        tree.glob(split.images) and (not split.labels or any(tree.glob(pattern) for pattern, _ in split.labels))
        for split in benchmark.splits.values()
    )


def _by_id(benchmark: Benchmark, tree: Tree, pattern: str) -> dict[str, str]:
    """Id -> reference; an unpacked file takes precedence over one of the same id in an archive elsewhere."""
    found: dict[str, str] = {}
    for name in tree.glob(pattern):
        key, reference = benchmark.identify(name), tree.reference(name)
        if key not in found or is_reference(found[key]):
            found[key] = reference
    return found


def _labels(benchmark: Benchmark, tree: Tree, files: Split, where: str) -> tuple[dict[str, str], str]:
    """Label maps in the first format of `files.labels` that is present, and the key of its encoding."""
    for pattern, key in files.labels:
        if found := _by_id(benchmark, tree, pattern):
            return (_run_lengths(found.popitem()[1]) if pattern.endswith(".json") else found), key
    if files.labels:
        patterns = " or ".join(pattern for pattern, _ in files.labels)
        raise InputError(f"{where}: there are images, but no label maps ({patterns}). {describe_source(benchmark)}")
    return {}, ""


def _run_lengths(reference: str) -> dict[str, str]:
    """Label maps of the JSON file with all run-length encodings."""
    return read_merged(read_reference(reference, _MERGED_LIMIT), describe_reference(reference))


def _members(files: Split, tree: Tree, where: str) -> set[str] | None:
    """Ids in the first list file of the split that is present; None if the split has no lists.

    Raises:
        InputError: the split is defined by a list, and it is missing.
    """
    for pattern in files.lists:
        for name in tree.glob(pattern):
            lines = tree.read(name).decode("utf-8", "replace").split("\n")
            return {Path(line.split()[0]).stem for line in lines if line.strip()}
    if files.lists:
        raise InputError(
            f"{where}: the list of its images is missing ({' or '.join(files.lists)}). Take it from the archive."
        )
    return None


def _damage(reference: str) -> str:
    """What is wrong with an image that may be damaged: an error, or "one color"; empty if it is intact."""
    try:
        values = np.asarray(read_image(reference))  # (H, W, 3)
    except InputError as error:
        return str(error)
    return "one color" if (values == values[:1, :1]).all() else ""


def describe_benchmarks() -> str:
    """Describe every benchmark: classes, splits with their sizes, license, source, expected files."""
    parts = []
    for name in NAMES:
        benchmark = get_benchmark(name)
        spec = benchmark.spec
        splits = ", ".join(
            f"{split} {files.size:,}{'' if files.labels else ' (images only)'}"
            for split, files in benchmark.splits.items()
        )
        patterns = [pattern for files in benchmark.splits.values() for pattern in (files.images, *dict(files.labels))]
        lines = [
            f"source: {spec.source_url}; license: {spec.license}",
            f"cite: {spec.citation}",
            f"archives: {', '.join(benchmark.archives)}; or unpacked, in a folder such as {benchmark.folders[0]}",
            f"files: {', '.join(dict.fromkeys(patterns))}",
            f"label specifications: {', '.join(f'{name}:{key}' for key in benchmark.encodings)}",
        ]
        parts.append(format_description(f"{name}: {spec.num_labels} classes; {splits}", lines))
    return "\n\n".join(parts)
