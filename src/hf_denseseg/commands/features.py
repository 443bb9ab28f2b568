"""`denseseg features`: class tokens and pixel features of a segmentation model, as figures and numbers."""

import argparse
import json
from typing import Any

from hf_denseseg.errors import InputError, unknown_name
from hf_denseseg.models.auto.tasks import SEMANTIC_SEGMENTATION

EPILOG = """examples:
  denseseg features runs/demo/model --dataset synthetic --output_dir runs/demo/features
  denseseg features CHECKPOINT --dataset path/to/camvid --output_dir features --classes road pavement --projection umap

--output_dir gets:
  tokens.png     what the classifier predicts for its own class tokens (high diagonal: classes are independent)
  features.png   a projection of pixel features to two dimensions, in the colors of the ground truth
  features.json  the numbers: token confidence, and how separable the classes are before projection

Without --classes the classes are shown that the checkpoint confuses most, at most eight; to compare checkpoints, name
the same classes for each. umap is the paper's projection; it and tsne need `pip install 'hf-denseseg[umap]'`."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `features` to the command line."""
    parser = subparsers.add_parser(
        "features",
        help="show class tokens and pixel features of a checkpoint",
        description="Show how well the features of a segmentation checkpoint separate the classes.",
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("checkpoint", help="folder or hub id of a segmentation model")
    add("--dataset", required=True, help="'synthetic', a benchmark, a folder or a hub id")
    add("--data_root", metavar="FOLDER", help="folder of the benchmark that --dataset names")
    add("--eval_split", metavar="SPLIT", default="val", help="val, train, test or the name of a folder (default: val)")
    add("--output_dir", metavar="FOLDER", required=True, help="folder to write")
    add("--classes", nargs="+", metavar="NAME", help="classes to show (default: see below)")
    add("--max_eval_samples", type=int, metavar="N", help="only the first N images (default: all)")
    add("--points", type=int, default=500, metavar="N", help="features per class (default: 500)")
    add("--projection", choices=("pca", "umap", "tsne"), default="pca", help="to two dimensions, by (default: pca)")
    add("--label_spec", metavar="FILE", help="label specification (default: found beside the data)")
    add("--seed", type=int, metavar="N", default=0, help="seed of the sampling and the projection (default: 0)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")


def main(args: argparse.Namespace) -> int:
    """Collect, measure and draw."""
    import torch
    import transformers
    from tqdm import tqdm

    from hf_denseseg import __version__
    from hf_denseseg.evaluation import class_separability
    from hf_denseseg.files import atomic_path, check_output_folder, write_atomic
    from hf_denseseg.inference.introspection import class_features
    from hf_denseseg.visualization import class_features as figures

    output, (predictor, data, chosen) = check_output_folder(args.output_dir), _load(args)
    model, spec = predictor.model, data.spec
    settings = predictor.settings
    tokens = class_features.find_class_tokens(model, *([settings.crop_size] if settings.mode == "slide" else []))
    rows = tqdm(data.dataset, desc="features", unit="image", disable=None)
    parts = class_features.labeled_features(model, tokens, rows, predictor.preprocessing, predictor.settings)
    found = class_separability.sample_features(parts, len(tokens), args.points, args.seed)
    _check_present([len(each) for each in found.samples], chosen, spec, "point on the feature maps")
    samples = {k: found.samples[k] for k in chosen or class_separability.most_confused(found.confusion)}
    title = f"features of {spec.name}, {args.eval_split}"
    plane, variance = figures.feature_figure(samples, spec, title, args.projection, args.seed)
    apart = class_separability.separability(list(samples.values()))
    diagonal = (confidence := class_separability.token_confidence(tokens)).diagonal()
    numbers = {
        "checkpoint": args.checkpoint,
        "model_type": model.config.model_type,
        "dataset": spec.name,
        "images": len(data.dataset),
        "token_shape": list(tokens.shape),
        "diagonal_mean": float(diagonal.mean()),
        "token_confidence": dict(zip(spec.classes, diagonal.tolist(), strict=True)),
        "points": {spec.classes[k]: len(each) for k, each in samples.items()},
        "separability": apart,
        "separability_all_classes": class_separability.separability([each for each in found.samples if len(each)]),
        "variance_in_plane": variance,
        "settings": {key: value for key, value in vars(args).items() if key not in ("command", "overrides")},
        "protocol": predictor.settings.to_dict(),
        "versions": {"hf_denseseg": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    for name, figure in (("tokens", figures.token_figure(confidence, spec.classes)), ("features", plane)):
        with atomic_path(output / f"{name}.png") as aside:
            figure.save(aside)
    write_atomic(output / "features.json", json.dumps(numbers, indent=1) + "\n")
    parts = ", ".join(f"{key.replace('_', ' ')} {value:.3f}" for key, value in apart.items() if value is not None)
    print(f"Class tokens: mean of the diagonal {diagonal.mean():.3f}, chance {1 / len(tokens):.3f}.")
    print(f"Features of {', '.join(spec.classes[k] for k in samples)}: {parts}.\nWritten: {output}")
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any, list[int] | None]:
    """Checkpoint, data and train ids of `--classes`; checks all it can before the model runs."""
    from hf_denseseg.data.checks.segmentation import scan_segmentation
    from hf_denseseg.data.class_order import in_order_of
    from hf_denseseg.data.segmentation import load_segmentation
    from hf_denseseg.inference.predict.segmentation import SegmentationPredictor
    from hf_denseseg.models.auto.pretrained import task_of_checkpoint
    from hf_denseseg.models.one_logit import class_names
    from hf_denseseg.visualization.class_features import check_projection

    for option, least in (("max_eval_samples", 1), ("points", 2)):
        if (value := getattr(args, option)) is not None and value < least:
            raise InputError(f"--{option} is {value}. Give {least} or more.")
    check_projection(args.projection)
    task = task_of_checkpoint(args.checkpoint)
    if task not in (None, SEMANTIC_SEGMENTATION):
        raise InputError(f"{args.checkpoint} is a checkpoint for {task}. Give one for {SEMANTIC_SEGMENTATION}.")
    predictor = SegmentationPredictor.load(args.checkpoint, {}, args.device)
    source = {"spec": args.label_spec, "root": args.data_root, "limit": args.max_eval_samples}
    data = load_segmentation(args.dataset, args.eval_split, pixel_format=predictor.pixel_format, **source)
    data = in_order_of(class_names(predictor.model.config), data, args.checkpoint)
    if unknown := [name for name in args.classes or () if name not in data.spec.classes]:
        raise InputError(unknown_name(f"class of {data.spec.name}", unknown[0], data.spec.classes))
    chosen = sorted({data.spec.label2id[name] for name in args.classes}) if args.classes else None
    scan = scan_segmentation(data, progress=True)
    if scan.faults:
        more = f" (and {len(scan.faults) - 1} more; `denseseg data check` lists all)" if len(scan.faults) > 1 else ""
        raise InputError(f"{args.dataset}: {scan.faults[0]}{more}")
    _check_present(scan.pixels, chosen, data.spec, "pixel in these images")
    return predictor, data, chosen


def _check_present(counts: Any, chosen: list[int] | None, spec: Any, what: str) -> None:
    """Refuse classes without anything to show, and fewer than two classes."""
    present = [k for k in range(spec.num_labels) if counts[k]]
    if absent := [spec.classes[k] for k in chosen or () if k not in present]:
        raise InputError(f"{', '.join(absent)}: no {what}. Name other classes, or raise --max_eval_samples.")
    if len(present if chosen is None else chosen) < 2:
        raise InputError("At least two classes are needed. Name more, or raise --max_eval_samples.")
