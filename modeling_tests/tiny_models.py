"""Sizes of tiny models that several test files build; those of the recipes stand in `test_published_<family>.py`."""

TINY_SETR = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 64,
    "decoder_hidden_size": 8,
    "num_labels": 3,
}
