"""The card of an exported model: that of its checkpoint, and a table of what was measured when it was exported."""

from pathlib import Path
from typing import Any

HEADING = "## Exported model"


def write_export_card(folder: Path, checkpoint: str, record: dict[str, Any]) -> None:
    """Write `README.md` into the folder of an export.

    Args:
        folder: of the export.
        checkpoint: folder or hub id; a folder's card is kept above the table.
        record: content of `export.json`.
    """
    card = Path(checkpoint) / "README.md"
    text = card.read_text() if card.is_file() else "---\nlibrary_name: transformers\n---\n"
    kept = text.split(HEADING)[0].rstrip()
    (folder / "README.md").write_text(f"{kept}\n\n{export_section(record)}")


def export_section(record: dict[str, Any]) -> str:
    """The section on an export: agreement, scores, cost, and with int8 the scores of every class."""
    cost, rows = record["cost"], record["verified"]
    low = min(row["agreement"] for row in rows)
    sizes = ", ".join(f"{row['height']}x{row['width']}" for row in rows)
    kind, before, after = "float32", "", ""
    if int8 := record.get("int8"):
        kind, before = "int8", " before quantization"
        after = f", and after it {100 * int8['agreement']:.2f} % on the calibration images"
    model, exported = cost["model"], cost["exported"]
    lines = [
        HEADING,
        "",
        f"`{record['file']}`, format {record['format']}, {kind}. It takes `{record['input']}` and returns "
        f"{', '.join(f'`{name}`' for name in record['outputs'])}; agreement with the checkpoint{before} at least "
        f"{100 * low:.2f} % of the classes ({sizes}){after}.",
        "",
        "| | checkpoint | exported |",
        "|---|---|---|",
    ]
    if score := record.get("score"):
        where = f"{score['metric']} on {score['dataset']} {score['split']} ({score['images']} images)"
        lines.append(f"| {where} | {100 * score['model']:.2f} | {100 * score['exported']:.2f} |")
    size, threads = "x".join(map(str, cost["size"])), cost["threads"]
    lines += [
        f"| milliseconds, {size}, {threads} thread{'s' * (threads > 1)} | {model['milliseconds']:.1f} | "
        f"{exported['milliseconds']:.1f} |",
        f"| peak memory, MiB | {model['peak_memory_bytes'] / 2**20:.0f} | "
        f"{exported['peak_memory_bytes'] / 2**20:.0f} |",
        f"| size of the weights' file, MiB | | {record['model_bytes'] / 2**20:.1f} |",
        "",
    ]
    if int8 and score:
        lines += ["| class | float32 | int8 |", "|---|---|---|"]
        lines += [
            f"| {row['class']} | {_percent(row['model'])} | {_percent(row['exported'])} |" for row in score["classes"]
        ]
        lines.append("")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "absent" if value is None else f"{100 * value:.2f}"
