"""DSCT: dual-stream convolution and Transformer (BMVC 2021)."""

PAPER = {
    "name": "DSCT",
    "variants": "`dsct-{tiny,small,base}-{sac,sapp}`, `dsct-{tiny,small,base}`",
    "title": "Rethinking Local and Global Feature Representation for Semantic Segmentation",
    "venue": "BMVC 2021",
    "official_code": "No official DSCT code is public; the encoder follows Conformer (Apache-2.0).",
    "differences": "Strides, head widths and the test protocol are inferred from the paper's parameter and FLOP "
    "columns; `models/dsct/README.md` lists every point the paper leaves open and what was decided.",
    "bibtex": """@inproceedings{chen2021rethinking,
  title = {Rethinking Local and Global Feature Representation for Semantic Segmentation},
  author = {Chen, Mohan and Zhao, Xinxuan and Fu, Bingfei and Zhang, Li and Xue, Xiangyang},
  booktitle = {British Machine Vision Conference (BMVC)},
  year = {2021}
}""",
}
