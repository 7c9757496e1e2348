"""Writes weights with random values and evaluates them."""

import pytest
import torch

from xformer.errors import UsageError
from xformer.recipes.eval import eval_weights
from xformer.recipes.settings import load_recipe
from xformer.recipes.weights import build_model, save_weights


def write(path, card):
    torch.manual_seed(0)
    save_weights(path, build_model(card).state_dict(), card)
    return str(path)


def evaluated(weights, data, given=(), **changes):
    said = []
    settings = {"weights": str(weights), "data": str(data), "workers": 0, **changes}
    return eval_weights(load_recipe("", settings), set(given), said.append), said


def refused(message, weights, data, given=(), **changes):
    with pytest.raises(UsageError, match=message) as caught:
        evaluated(weights, data, given, **changes)
    assert "\n" not in str(caught.value)
