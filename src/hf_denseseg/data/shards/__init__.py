"""Parquet and WebDataset shards with checksums: packing, reading and streaming."""
