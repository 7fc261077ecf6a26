#!/usr/bin/env bash
# huggingface_hub 2.4.0, PyTorchModelHubMixin: a model's arguments that are no JSON, saved and loaded again.
#
# Guess: save_pretrained stores the arguments of __init__ or raises for one that it cannot store; at least from_pretrained
# warns that one is missing.
# Seen: an argument that JSON cannot hold (a dtype, a class) is left out of config.json without a word, and
# from_pretrained builds the model with the default. A tuple comes back as a list, keys of a dict as text.
#
#   argument    given            loaded again
#   dim         8                8
#   dtype       bfloat16         float32 (the default)
#   activation  GELU             ReLU (the default)
#   grid        (3, 4)           [3, 4]
#   names       {1: "a"}         {"1": "a"}
#
# The weights load strictly, since activations have none: the other model gives other images. Fails if this changes.
set -euo pipefail
folder="$(mktemp -d)" && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.14.1 numpy==2.4.6 huggingface_hub==2.4.0 safetensors==0.8.0
cat >"$folder/look.py" <<'PYTHON'
import sys
import warnings

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn


class Model(nn.Module, PyTorchModelHubMixin):
    """A layer and its activation."""

    def __init__(self, dim=4, dtype=torch.float32, activation=nn.ReLU, grid=(1, 2), names=None):
        super().__init__()
        self.arguments = {"dim": dim, "dtype": dtype, "activation": activation, "grid": grid, "names": names}
        self.layer, self.activation = nn.Linear(dim, dim), activation()

    def forward(self, x):
        """Apply both."""
        return self.activation(self.layer(x))


given = {"dim": 8, "dtype": torch.bfloat16, "activation": nn.GELU, "grid": (3, 4), "names": {1: "a"}}
model = Model(**given)
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    model.save_pretrained(sys.argv[1])
    again = Model.from_pretrained(sys.argv[1])
for name, value in again.arguments.items():
    print(f"{name:10s} {given[name]} -> {value}")
expected = {"dim": 8, "dtype": torch.float32, "activation": nn.ReLU, "grid": [3, 4], "names": {"1": "a"}}
assert again.arguments == expected, "changed: what comes back"
assert not [w for w in warned if "dtype" in str(w.message) or "activation" in str(w.message)], "changed: it warns"
x = torch.randn(2, 8)
assert not torch.allclose(model(x), again(x))
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$folder/model"
echo "as stated"
