"""Sizes of tiny models that several test files build; those of the recipes stand in `test_published_<family>.py`."""

from pathlib import Path

import torch

import hf_denseseg

TINY_SETR = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "decoder_hidden_size": 8,
    "num_labels": 3,
}


def save_decided_setr(folder: Path) -> Path:
    """Save a SETR for the drawn street scenes whose classes differ from place to place, with its image processor."""
    torch.manual_seed(0)
    spec = hf_denseseg.load_segmentation("synthetic", "val", limit=1).spec
    fields = {**TINY_SETR, "num_hidden_layers": 2, "auxiliary_layers": [0, 1], "num_labels": spec.num_labels}
    model = hf_denseseg.create_model("setr-naive-deit-base", **fields, id2label=spec.id2label)
    with torch.no_grad():
        for each in model.decode_head.parameters():
            each.mul_(20)
    model.save_pretrained(folder)
    hf_denseseg.create_image_processor(model.config, do_resize=False).save_pretrained(folder)
    return folder
