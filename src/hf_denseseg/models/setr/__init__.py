"""SETR: segmentation as sequence-to-sequence prediction with a plain Transformer (CVPR 2021, IJCV 2024)."""

PAPER = {
    "name": "SETR",
    "variants": "`setr-{naive,pup,mla}-{vit-large,vit-base,deit-base}`, `setr-{pup,mla}-beit-large`",
    "title": "Vision Transformers: From Semantic Segmentation to Dense Prediction",
    "venue": "IJCV 2024; SETR first at CVPR 2021",
    "official_code": "Official code: fudan-zvg/SETR (MIT); outputs recorded from it are reproduced to rounding.",
    "differences": "Images may have any size, square or not; logits come at the resolution of the last convolution; "
    "the BEiT encoder is transformers' own, since no code of it was released. `models/setr/README.md` lists every "
    "point where code and paper differ and which one is followed.",
    "bibtex": """@article{zhang2024vision,
  title = {Vision Transformers: From Semantic Segmentation to Dense Prediction},
  author = {Zhang, Li and Lu, Jiachen and Zheng, Sixiao and Zhao, Xinxuan and Zhu, Xiatian and Fu, Yanwei and
            Xiang, Tao and Feng, Jianfeng and Torr, Philip H. S.},
  journal = {International Journal of Computer Vision},
  year = {2024}
}""",
}
