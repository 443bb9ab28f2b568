"""HFGD: high-level features guide the decoder (Huang et al., 2024)."""

PAPER = {
    "name": "HFGD",
    "variants": "`hfgd-{resnet50,swin-large,convnext-large}`, `hfgd-{resnet50,convnext-large}-os2`",
    "title": "High-level Feature Guided Decoding for Semantic Segmentation",
    "venue": "IEEE TCSVT 2024, arXiv 2303.08646",
    "official_code": "The authors published no code of HFGD; their TensorFlow code of its parts is "
    "https://github.com/edwardyehuang/iSeg and https://github.com/edwardyehuang/CAR (MIT).",
    "differences": "See src/hf_denseseg/models/hfgd/README.md: no official complete model exists to compare with. "
    "Merge width, projections of the axial attention, place of the stops and loss weights are not in the paper's "
    "text; the README says what was chosen and why.",
    "bibtex": "@article{huang2024hfgd,\n"
    "  title = {High-level Feature Guided Decoding for Semantic Segmentation},\n"
    "  author = {Huang, Ye and Kang, Di and Gao, Shenghua and Li, Wen and Duan, Lixin},\n"
    "  journal = {IEEE Transactions on Circuits and Systems for Video Technology},\n"
    "  year = {2024},\n"
    "  note = {arXiv:2303.08646}\n}",
}
