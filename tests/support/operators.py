"""Compiles DeepSpeed's operators before the tests: on a new machine that takes minutes, more than a test's time limit.

Without a C++ compiler it does nothing; the tests then say what they need. The compiler reads fewer declarations than
for users (`include`), of the same code; if that fails, the tests that need an operator compile it as users do.
"""

import os
import time
from pathlib import Path

import torch

from ibq.engine.base import OptimizerConfig
from ibq.engine.configs import ZeroEngineConfig
from ibq.engine.zero_setup import build_operators, load_deepspeed
from support import needs

if __name__ == "__main__" and not needs.missing(*needs.NVME):
    print("compiling DeepSpeed's operators, once on a machine: some minutes", flush=True)
    start = time.monotonic()
    # Looked through before PyTorch's own headers.
    folders = str(Path(__file__).with_name("include")), os.environ.get("CPATH")
    os.environ["CPATH"] = os.pathsep.join(filter(None, folders))
    load_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    build_operators(ZeroEngineConfig(offload_optimizer="nvme", nvme_path="."), OptimizerConfig())
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
