"""Mutants of the core modules, made and run by cosmic-ray: how many the tests beside a module see
(`make test-mutants`).

    python tests/mutants/mutate.py [--only WORD ...] [--each 40] [--seed 0]

Of each module some mutants are drawn. Those that no test sees are printed with their change; some
change nothing that could be seen.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from copies import LIMIT_S, copy_of_the_tree
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome, WorkItem

MODULES = {  # and their tests
    "kernels/route/reference.py": "tests/kernels/test_route.py",
    "kernels/permute/reference.py": "tests/kernels/test_permute.py",
    "flexolmo_jax/coordinator/gate.py": "tests/attacks/test_numbers.py"
    " tests/exchange/test_signature.py tests/owner/test_screen.py",
    "flexolmo_jax/data/mixture.py": "tests/data/test_mixture.py",
    "flexolmo_jax/data/packing.py": "tests/data/test_packing.py",
    "flexolmo_jax/model/moe.py": "tests/model/test_moe.py",
    "flexolmo_jax/plan/roofline.py": "tests/plan/test_roofline.py",
    "flexolmo_jax/train/losses.py": "tests/train/test_losses.py",
    "flexolmo_jax/train/optimizer.py": "tests/train/test_optimizer.py",
}
CONFIG = """
[cosmic-ray]
module-path = "{module}"
timeout = {limit}
excluded-modules = []
test-command = "{python} -m pytest -x -q -n 0 -m 'not slow' {tests}"

[cosmic-ray.distributor]
name = "local"
"""
TYPES = "BitOr"  # `a | b` stands in types alone


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="modules whose name holds a word")
    parser.add_argument("--each", type=int, default=40, help="mutants of a module, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    seen = total = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(Path(folder))
        for module in (m for m in MODULES if any(word in m for word in options.only)):
            survivors, count = mutate(tree, module, options.each, options.seed)
            for change in survivors:
                print(change, flush=True)
            print(f"{module}: {count - len(survivors)} of {count} mutants seen", flush=True)
            seen, total = seen + count - len(survivors), total + count
    print(f"{seen} of {total} mutants seen: {seen / max(total, 1):.0%}")
    return 0 if total else 1


def mutate(tree: Path, module: str, each: int, seed: int) -> tuple[list[str], int]:
    """The changes that no test saw, and how many mutants ran."""
    config, session = tree / "cosmic-ray.toml", tree / "session.sqlite"
    tests = MODULES[module]
    text = CONFIG.format(module=module, limit=LIMIT_S, python=sys.executable, tests=tests)
    config.write_text(text)
    session.unlink(missing_ok=True)
    cosmic_ray(tree, "init", config, session)
    with use_db(session, WorkDB.Mode.open) as db:
        items = [item for item in db.work_items if not is_of_types(item)]
        random.Random(seed).shuffle(items)
        db.clear()
        db.add_work_items(items[:each])
    cosmic_ray(tree, "exec", config, session)
    with use_db(session, WorkDB.Mode.open) as db:
        results = [result for _, result in db.results]
    survived = [r.diff or "" for r in results if r.test_outcome == TestOutcome.SURVIVED]
    return survived, len(results)


def is_of_types(item: WorkItem) -> bool:
    return any(TYPES in mutation.operator_name for mutation in item.mutations)


def cosmic_ray(tree: Path, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", "cosmic_ray.cli", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
