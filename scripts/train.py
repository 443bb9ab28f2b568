"""Train a model from a recipe, in one or several processes; the same as `denseseg train`.

python scripts/train.py scripts/recipes/dsct/dsct_tiny_sac_camvid_cpu.yaml --dataset path/to/camvid --max_steps 100
accelerate launch scripts/train.py RECIPE.yaml
torchrun --nproc_per_node 2 scripts/train.py RECIPE.yaml --use_cpu
"""

import sys

from hf_denseseg.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
