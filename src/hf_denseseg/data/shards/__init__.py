"""Parquet and WebDataset shards with checksums: packing, reading, streaming."""
