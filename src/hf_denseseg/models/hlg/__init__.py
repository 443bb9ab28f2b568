"""HLG: a pyramid of local and global attention for classification, segmentation and detection (IJCV 2024)."""

PAPER = {
    "name": "HLG",
    "variants": "`hlg-{mobile,tiny,small,medium,large}`, `hlg-{mobile,tiny,small,medium,large}-release`, "
    "`hlg-{pup,upernet}-{small,medium,large}`, `hlg-{retinanet,maskrcnn}-{tiny,small,medium,large}`",
    "title": "Vision Transformers: From Semantic Segmentation to Dense Prediction",
    "venue": "IJCV 2024, Sec. 3.3 and 3.4",
    "official_code": "Official code: fudan-zvg/SETR (MIT), of which no copy of HLG can run; outputs recorded from a "
    "repaired copy are reproduced to rounding.",
    "differences": "No released copy of HLG runs; `models/hlg/README.md` lists each defect and what is done instead. "
    "The position bias of the global attention is a field, `global_bias`: `window` (ours, the default) for training "
    "from scratch, `flat` and `tuple4` for the two rules of the release. Padded tokens are masked (`mask_padding`); "
    "the release builds the mask and never applies it.",
    "bibtex": """@article{zhang2024vision,
  title = {Vision Transformers: From Semantic Segmentation to Dense Prediction},
  author = {Zhang, Li and Lu, Jiachen and Zheng, Sixiao and Zhao, Xinxuan and Zhu, Xiatian and Fu, Yanwei and
            Xiang, Tao and Feng, Jianfeng and Torr, Philip H. S.},
  journal = {International Journal of Computer Vision},
  year = {2024}
}""",
}
