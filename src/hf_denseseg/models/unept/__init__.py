"""UN-EPT: sparse pyramid attention for context, a spatial branch for details and boundaries (ICCV 2021 workshop)."""

PAPER = {
    "name": "UN-EPT",
    "variants": "`unept-{resnet50,deit-base}`",
    "title": "A Unified Efficient Pyramid Transformer for Semantic Segmentation",
    "venue": "ICCV 2021 workshop",
    "official_code": "Official code: amazon-research/unified-ept (Apache-2.0); outputs, losses and gradients recorded "
    "from it are reproduced to rounding. No trained checkpoint was released.",
    "differences": "Loss weights are those of the released code (0.8, 1, 5, 0.6), not of the text (1, 1.5, 3, 0.7); "
    "`loss_weights: paper` gives the latter. The prediction is the coarse map, as the released code tests it; the "
    "paper's figures show the refined one (`use_boundary_refinement`). Boundary and direction targets are made from "
    "the augmented crop, and ignored pixels are left out of both. `models/unept/README.md` lists every point where "
    "code and paper differ.",
    "bibtex": """@inproceedings{zhu2021unified,
  title = {A Unified Efficient Pyramid Transformer for Semantic Segmentation},
  author = {Zhu, Fangrui and Zhu, Yi and Zhang, Li and Wu, Chongruo and Fu, Yanwei and Li, Mu},
  booktitle = {IEEE/CVF International Conference on Computer Vision Workshops (ICCVW)},
  year = {2021}
}""",
}
