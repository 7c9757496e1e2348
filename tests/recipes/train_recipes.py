"""``python tests/recipes/train_recipes.py A.json B.json``: several runs by one start of python, or of torchrun.

Each start imports torch once more in every process, which takes longer than these runs do.
"""

import json
import sys
from pathlib import Path

from xformer.recipes.settings import Recipe
from xformer.recipes.train import Run

for path in sys.argv[1:]:
    Run(Recipe(**json.loads(Path(path).read_text()))).fit()
