"""Draw a run's curves over those of the reference runs of the same config: is its loss normal?

python tools/compare_run.py runs/quickstart/tokenizer
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ibq.config import UserError, exit_on_user_error
from tools.lib import ROOT

COMMITTED = ROOT / "tools/references"
EPILOG = """\
RUN is a run's folder; it may still be running. References are this project's (tools/references: the quickstart and the
ablations) and those of --references. A config is the same if all settings are that change the curves; how it differs in
length, precision and the like is said, and a run of another config is compared only on --reference NAME.

examples:
  python tools/compare_run.py runs/quickstart/tokenizer
  python tools/compare_run.py runs/mine --reference quickstart_tokenizer
  python tools/compare_run.py runs/mine --add mine --references my_references
"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run's folder")
    add("--reference", metavar="NAME", help="compare with this one, whatever its config")
    add("--references", metavar="FOLDER", type=Path, help="of your own references, besides the project's")
    add("--add", metavar="NAME", help="keep RUN as a reference of this name in the folder of --references")
    add("--output", metavar="FILE", type=Path, help="the page (default: compare.html in RUN)")
    arguments = parser.parse_args(argv)
    if arguments.add is not None and arguments.references is None:
        raise UserError("--add: where? name your folder by --references FOLDER")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Compare, or add, as the command line says."""
    arguments = parse(argv)
    from tools.lib.compare import references, verdict, view  # read PyTorch

    run = references.read_run(arguments.run)
    own = [] if arguments.references is None else [arguments.references]
    if arguments.add is not None:
        others = references.read_references([one for one in own if one.is_dir()])
        print(f"written: {references.add_reference(run, arguments.add, own[0], others)}")
        return
    chosen = references.choose(run, references.read_references([COMMITTED, *own]), arguments.reference)
    verdicts = verdict.judge(run, chosen)
    notes = describe(run, chosen, references)
    heads = {"run": "this run", "references": "references"}
    print("\n".join([*notes, *verdict.as_lines(verdicts, heads)]))
    output = arguments.output or arguments.run / "compare.html"
    try:
        view.write_view(output, run, chosen, verdicts, notes)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written ({error}); give another file") from error
    print(f"written: {output}")


def describe(run, chosen, references) -> list[str]:
    """Whom the run is compared with, and in what they differ."""
    names = sorted({one.name for one in chosen})
    seeds = sorted({one.seed for one in chosen})
    settings = {key: value for key, value in run.config.items() if key.split(".")[0] not in references.FREE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]
    steps = max(one.rows[-1]["step"] for one in chosen)
    notes = [
        f"{run.name}: config {digest}, {run.rows[-1]['step']:,} steps; {', '.join(names)}: {len(chosen)} "
        f"run{'s' * (len(chosen) > 1)} (seed {', '.join(map(str, seeds))}) of {steps:,} steps"
    ]
    if differing := references.differences(run, chosen[0]):
        notes.append(f"ANOTHER CONFIG: {references.shown(differing)}")
    if said := references.differences(run, chosen[0], said=True):
        notes.append(f"differs, as it may, in {references.shown(said)}")
    return notes


if __name__ == "__main__":
    exit_on_user_error(main)
