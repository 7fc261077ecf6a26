"""Dies in its first life, and in the second rank 1 comes late: rank 0 must not take old addresses for new ones.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 tests/workers/restart_worker.py FOLDER ours|torch

"torch" joins the process group as torch does by itself. FOLDER/RANK.done appears when the second life has worked.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as torch_dist

from ibq import dist


def main() -> None:
    folder, how = Path(sys.argv[1]), sys.argv[2]
    second = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
    if second and os.environ["RANK"] == "1":
        time.sleep(2.0)
    if how == "torch":
        torch_dist.init_process_group("gloo")
    else:
        dist.setup("cpu")
    assert float(dist.all_reduce_sum(torch.ones(()))) == 2.0
    if second:
        (folder / f"{dist.rank()}.done").touch()
    sys.stdout.flush()
    os._exit(0 if second else 1)


if __name__ == "__main__":
    main()
