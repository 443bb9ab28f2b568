"""Where data comes from: folders, the layouts of COCO and ImageNet, and benchmarks as officially distributed."""
