"""`flexolmo reproduce`: runs a study's cells, each in its own process, and writes its results.

DIR/spec.yaml   DIR/text   DIR/data   DIR/seed0 ...   DIR/logs/<cell>.log   DIR/results.json
DIR/results.md   DIR/report.html
"""

import sys
from pathlib import Path
from typing import Any

from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import make_folder, write_text
from flexolmo_jax.storage.locks import alone_at
from flexolmo_jax.storage.paths import children, takes_paths

from .cells import cells, check_sources
from .results import write_results
from .running import run_cell, run_cells
from .spec import load_spec

SPEC = "spec.yaml"


@takes_paths
@alone_at("root")
def reproduce(spec_path: Path, root: Path) -> dict[str, Any]:
    """Runs a study in a directory and returns its results. Stopped and called again, it continues.

    Raises UserError for a directory that holds anything else, and while another process writes it;
    RunError if a cell fails.
    """
    spec = load_spec(spec_path)
    content = spec_path.read_text()
    make_folder(root)
    kept = root / SPEC
    if not kept.exists():
        if others := [path.name for path in children(root)]:
            raise UserError(
                f"{root} holds {others[0]}, but no study; give a new or an empty directory"
            )
        write_text(kept, content)
    elif load_spec(kept) != spec:
        raise UserError(
            f"{root} holds another study; give a new --out, or the file that it was started with"
            f" ({kept})"
        )
    check_sources(spec, root)
    run_cells(cells(spec, root), root, spec.workers, __name__)
    return write_results(spec, root)


if __name__ == "__main__":
    root, name = Path(sys.argv[1]), sys.argv[2]
    sys.exit(run_cell(cells(load_spec(root / SPEC), root)[name]))
