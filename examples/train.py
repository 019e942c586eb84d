"""
Train a stage by its recipe, on one device or many.

    python examples/train.py emoji/stage1 --out runs/stage1 --compile
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train.py paper/stage1 --out runs/stage1

Run the line again after an interruption: it continues from the last complete checkpoint. The finished model and its
processor are in `OUT/final`.
"""

import argparse

from mars_hf.training.recipe import Recipe
from mars_hf.training.run import train

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file, or a recipe of the package")
    parser.add_argument("--out", required=True)
    parser.add_argument("--compile", action="store_true", help="compile what follows the prompts")
    parser.add_argument("--allow-changes", action="store_true", help="go on although recipe, data or processes differ")
    options = parser.parse_args()
    print(train(Recipe.load(options.recipe), options.out, options.compile, options.allow_changes))
