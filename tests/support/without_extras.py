"""Run scripts, or code, where nothing is installed but what a plain installation brings.

    python tests/support/without_extras.py 'SCRIPT ARGUMENTS' ...

One after the other in one process; each says `exit CODE` on stdout when it is done. `light CODE` runs code.
"""

import os
import runpy
import shlex
import sys
from importlib.abc import MetaPathFinder

from ibq.extras import EXTRA_OF


class Absent(MetaPathFinder):
    """Nothing of the extras is there."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in EXTRA_OF:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


if __name__ == "__main__":
    assert not EXTRA_OF.keys() & sys.modules.keys(), "has to be a new process"
    sys.meta_path.insert(0, Absent())
    path = list(sys.path)
    for line in sys.argv[1:]:
        script, *arguments = sys.argv = shlex.split(line)
        code = 0
        try:
            if script == "light":
                exec(arguments[0], {})
            else:
                sys.path[:] = [os.path.dirname(script), *path]
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        print(f"exit {code}", flush=True)
