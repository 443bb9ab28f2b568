"""Where data come from: folders, COCO's and ImageNet's layout, and benchmarks in their official form."""
