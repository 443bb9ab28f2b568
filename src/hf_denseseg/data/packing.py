"""Write pairs into shards with the pictures inside."""

import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from hf_denseseg.data.shards import import_datasets
from hf_denseseg.files import atomic_path, write_atomic


def write_parquet(data: Any, folder: str | Path, split: str, rows_per_shard: int = 500) -> list[Path]:
    """Write pairs as Parquet shards with the pictures inside, and the label specification beside them.

    Files are taken byte for byte (labels keep their raw ids); embedded scenes are stored as PNG.

    Args:
        data: what `load_segmentation` returned.
        folder: gets `<split>-00000-of-0000N.parquet` and `labels.json`.
        split: name in the file names.
        rows_per_shard: pairs per file.

    Returns:
        The shards.
    """
    datasets = import_datasets()
    features = datasets.Features(image=datasets.Image(), label=datasets.Image(), id=datasets.Value("string"))
    count = -(-len(data.dataset) // rows_per_shard)
    rows, paths = _encoded_rows(data), []
    for number in range(count):
        part = list(islice(rows, rows_per_shard))
        columns = {key: [row[key] for row in part] for key in features}
        paths.append(Path(folder) / f"{split}-{number:05d}-of-{count:05d}.parquet")
        with atomic_path(paths[-1]) as aside:
            datasets.Dataset.from_dict(columns, features=features).to_parquet(aside)
    write_atomic(Path(folder) / "labels.json", json.dumps(data.spec.to_dict(), indent=1) + "\n")
    return paths


def _encoded_rows(data: Any) -> Iterator[dict[str, Any]]:
    """Rows whose pictures are `{"bytes", "path"}`."""
    stored = data.dataset.with_format(None)
    embedded = "image" not in stored.column_names
    for row in data.dataset if embedded else stored:
        result: dict[str, Any] = {"id": row["id"]}
        for key in ("image", "label"):
            if embedded:
                picture = row["image"] if key == "image" else Image.fromarray(data.spec.decode(row["label"]))
                buffer = io.BytesIO()
                picture.save(buffer, "PNG")
                result[key] = {"bytes": buffer.getvalue(), "path": None}
            else:
                content, path = row[key]["bytes"], row[key]["path"]
                # Without a path: `datasets` drops the bytes of a picture whose path exists.
                result[key] = {"bytes": Path(path).read_bytes() if content is None else content, "path": None}
        yield result
