"""Find the files of a benchmark below a folder, and say what is missing when they are not there."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hf_denseseg.data.labels import LabelSpec
from hf_denseseg.data.reading.archives import Tree, open_tree
from hf_denseseg.data.reading.images import read_image
from hf_denseseg.data.reading.references import describe_reference, is_reference, read_reference
from hf_denseseg.data.reading.run_lengths import read_merged
from hf_denseseg.data.sources.benchmarks.layouts import NAMES, Benchmark, Split, get_benchmark
from hf_denseseg.data.sources.folders import Pairs, has_pairs, merge_pairs
from hf_denseseg.data.sources.official import ROOT_VARIABLE, described, fetch_text, official_trees, source_text
from hf_denseseg.data.splits import resolve_split
from hf_denseseg.errors import InputError

FETCH_NOTE = f"""Nothing is downloaded: fetch the archives yourself, and leave them packed or not. Their folder, or the
one in which it lies, is data_root ({ROOT_VARIABLE} if that is not given)."""
_MERGED_LIMIT = 2**31  # bytes of trainval_merged.json, which holds parts, borders and occlusions too


class Listing(NamedTuple):
    """Files of one split of a benchmark.

    Args:
        pairs: images and label maps; of a split without published labels only images.
        spec: what the ids in these label maps mean.
        notes: what is unusual, but may be meant.
        has_labels: whether the split has published labels.
    """

    pairs: Pairs
    spec: LabelSpec
    notes: list[str]
    has_labels: bool


def open_benchmark(name: str, root: str | Path | None = None) -> tuple[Benchmark, Tree]:
    """Find a benchmark by its name.

    Args:
        name: one of `NAMES`.
        root: folder (or archive) with the official files, or a folder in which their folder lies; when None that of
            the environment variable DENSESEG_DATA_ROOT, else the current one.

    Raises:
        InputError: the files are not there; the message says which they are and where they come from.
    """
    benchmark = get_benchmark(name)
    for tree in official_trees(name, root, benchmark.folders, benchmark.archives):
        if _is_here(benchmark, tree):
            return benchmark, tree
    spec, files = benchmark.spec, ", ".join(benchmark.archives)
    pairs = " It is a folder of pairs; give it as the dataset itself." if root and has_pairs(Path(root)) else ""
    raise InputError(fetch_text(name, root, spec.source_url, spec.license, files) + pairs)


def recognise(path: Path, chosen: str = "") -> tuple[Benchmark, Tree] | None:
    """The benchmark that a folder or archive holds, by the names of its files; None if there is none.

    Args:
        path: folder or archive.
        chosen: name of the benchmark that is meant if there are several.

    Raises:
        InputError: it may be several, and none of them is chosen.
    """
    known = [get_benchmark(name) for name in NAMES]
    tree = open_tree(path, tuple(pattern for each in known for pattern in each.archives))
    found = [each for each in known if _is_here(each, tree)]
    found = [each for each in found if each.name == chosen] or found
    if len(found) > 1:
        names = [each.name for each in found]
        raise InputError(
            f"{path} may be {' or '.join(names)}: the files are there for all of them. Give the name as the dataset "
            f"and the folder as data_root, such as `--dataset {names[0]} --data_root {path}`."
        )
    return (found[0], tree) if found else None


def list_split(benchmark: Benchmark, tree: Tree, split: str) -> Listing:
    """List the images and label maps of a split.

    Raises:
        InputError: there is no such split, or its files are not all there.
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
        if absent := sorted(members - set(images)):
            raise InputError(f"{where}: {len(absent)} images are missing, first {absent[0]}. {_again(benchmark)}")
    for each in benchmark.damaged:
        if each in images and (wrong := _damage(images[each])):
            notes.append(f"{where}: {each} is left out, known to be distributed damaged ({wrong}).")
            del images[each]
            labels.pop(each, None)
    if not images:
        raise InputError(f"{where}: none of the images belongs to it. {_again(benchmark)}")
    if len(images) + len(notes) < files.size:
        notes.append(f"{where}: {len(images):,} of {files.size:,} images; this is a partial copy.")
    elif len(images) > files.size:
        notes.append(f"{where}: {len(images):,} images, where {files.size:,} were published.")
    places = files.images, " or ".join(pattern for pattern, _ in files.labels)
    spec = benchmark.encodings[key] if key else benchmark.spec
    return Listing(Pairs(images, labels, *places), spec, notes, bool(files.labels))


def describe_source(benchmark: Benchmark) -> str:
    """Where the data come from, their license, and which files are looked for."""
    return source_text(benchmark.spec.source_url, benchmark.spec.license, ", ".join(benchmark.archives))


def _again(benchmark: Benchmark) -> str:
    return f"Complete the copy from {benchmark.spec.source_url}."


def _is_here(benchmark: Benchmark, tree: Tree) -> bool:
    return any(
        tree.glob(split.images) and (not split.labels or any(tree.glob(pattern) for pattern, _ in split.labels))
        for split in benchmark.splits.values()
    )


def _by_id(benchmark: Benchmark, tree: Tree, pattern: str) -> dict[str, str]:
    """Id -> reference; of two files of one id (a folder and an archive in two places) the unpacked one."""
    found: dict[str, str] = {}
    for name in tree.glob(pattern):
        key, reference = benchmark.identify(name), tree.reference(name)
        if key not in found or is_reference(found[key]):
            found[key] = reference
    return found


def _labels(benchmark: Benchmark, tree: Tree, files: Split, where: str) -> tuple[dict[str, str], str]:
    """Label maps of the preferred form that is there, and the key of its encoding."""
    for pattern, key in files.labels:
        if found := _by_id(benchmark, tree, pattern):
            return (_run_lengths(found.popitem()[1]) if pattern.endswith(".json") else found), key
    if files.labels:
        looked = " or ".join(pattern for pattern, _ in files.labels)
        raise InputError(f"{where}: images, but no label maps ({looked}). {describe_source(benchmark)}")
    return {}, ""


def _run_lengths(reference: str) -> dict[str, str]:
    return read_merged(read_reference(reference, _MERGED_LIMIT), describe_reference(reference))


def _members(files: Split, tree: Tree, where: str) -> set[str] | None:
    """Ids that a list in the data names."""
    for pattern in files.lists:
        for name in tree.glob(pattern):
            lines = tree.read(name).decode("utf-8", "replace").split("\n")
            return {Path(line.split()[0]).stem for line in lines if line.strip()}
    if files.lists:
        raise InputError(f"{where}: no list of its images ({' or '.join(files.lists)}). Take it from the archive.")
    return None


def _damage(reference: str) -> str:
    """What is wrong with an image that is suspected: unreadable, or of one color; nothing when it is good."""
    try:
        image = read_image(reference)
    except InputError as error:
        return str(error)
    return "one color" if image.getcolors(1) else ""


def merge_listings(listings: Mapping[str, Listing]) -> Listing:
    """Several splits as one, such as `train+val`.

    Raises:
        InputError: their label maps have different encodings, or one has none.
    """
    first, *others = listings.values()
    if any((each.spec, each.has_labels) != (first.spec, first.has_labels) for each in others):
        raise InputError(
            f"The label maps of {' and '.join(listings)} differ in kind. Use splits of one kind together."
        )
    pairs = merge_pairs({split: each.pairs for split, each in listings.items()})
    return Listing(pairs, first.spec, [note for each in listings.values() for note in each.notes], first.has_labels)


def describe_benchmarks() -> str:
    """Every benchmark in a few lines: classes, splits with their sizes, license, source, files that are looked for."""
    parts = []
    for name in NAMES:
        benchmark = get_benchmark(name)
        spec = benchmark.spec
        splits = ", ".join(
            f"{split} {files.size:,}{'' if files.labels else ' (images only)'}"
            for split, files in benchmark.splits.items()
        )
        looked = [pattern for files in benchmark.splits.values() for pattern in (files.images, *dict(files.labels))]
        lines = [
            f"source: {spec.source_url}; license: {spec.license}",
            f"cite: {spec.citation}",
            f"archives: {', '.join(benchmark.archives)}; or unpacked, in a folder such as {benchmark.folders[0]}",
            f"files: {', '.join(dict.fromkeys(looked))}",
            f"label specifications: {', '.join(f'{name}:{key}' for key in benchmark.encodings)}",
        ]
        parts.append(described(f"{name}: {spec.num_labels} classes; {splits}", lines))
    return "\n\n".join(parts)
