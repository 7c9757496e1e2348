"""``python tests/train_recipes.py A.yaml B.yaml``: several runs by one start of python, or of torchrun.

Each start imports torch once more in every process, which takes longer than these runs do.
"""

import sys

from xformer.engine.loop import Run
from xformer.recipe import load_recipe

for path in sys.argv[1:]:
    Run(load_recipe(path)).fit()
