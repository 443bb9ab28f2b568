"""DSCT: dual-stream convolution and Transformer (BMVC 2021)."""
