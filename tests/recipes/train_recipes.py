"""``python tests/recipes/train_recipes.py A.json B.json``: several runs in one start of Python or torchrun.

Each start imports torch again in every process, which takes longer than these runs.
"""

import json
import sys
from pathlib import Path

from xformer.recipes.settings import Recipe
from xformer.recipes.train import Run

for path in sys.argv[1:]:
    Run(Recipe(**json.loads(Path(path).read_text()))).fit()
