"""Faults that somebody could make, planted one after the other into a copy of this tree: the tests
beside the code must fail for each (`make test-mutants`).

    python tests/mutants/planted.py [--only WORD ...]

Each fault is a line of code, what stands in its place, and where the tests are: the fast ones of a
file, or one by its name. One that no test sees is printed, and the command ends with 1. The sources
are known by their text, so a fault whose line has changed is an error: write it anew.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from copies import copy_of_the_tree, run_tests


class Fault(NamedTuple):
    file: str
    line: str
    instead: str
    tests: str
    what: str


FEED, HELDOUT = "flexolmo_jax/train/feed.py", "flexolmo_jax/train/heldout.py"
LOSSES, STEP = "flexolmo_jax/train/losses.py", "flexolmo_jax/train/step.py"
MOE, FLOPS = "flexolmo_jax/model/moe.py", "flexolmo_jax/train/flops.py"
ROOFLINE, REPORT = "flexolmo_jax/plan/roofline.py", "flexolmo_jax/plan/report.py"
OF_LOSSES, OF_MOE = "tests/train/test_losses.py", "tests/model"
OF_STEP = f"tests/train/test_step.py {OF_LOSSES}"
FAULTS = (
    # --- train ---
    Fault(
        FEED,
        "left_out(batch, self._loss)",
        "None",
        "tests/train/test_assistant_loss.py",
        "what the user says is learnt, whatever data.loss is",
    ),
    Fault(
        HELDOUT,
        "loss=self._job.config.data.loss,",
        "",
        "tests/owner/test_conversations.py",
        "a run scores what the user says, and does not learn it",
    ),
    Fault(
        LOSSES,
        "jnp.roll(tokens, -1, axis=1)",
        "jnp.roll(tokens, 1, axis=1)",
        OF_LOSSES,
        "each position predicts the token before it",
    ),
    Fault(
        LOSSES,
        "jnp.pad(targets[:, 1:], ((0, 0), (0, 1)))",
        "targets",
        OF_LOSSES,
        "targets are counted where they stand, not where they are predicted",
    ),
    Fault(
        LOSSES,
        "jnp.sum(jnp.mean(jnp.square(router.log_z), axis=0) * mask)",
        "jnp.sum(jnp.sum(jnp.square(router.log_z), axis=0) * mask)",
        OF_LOSSES,
        "the routers' z-loss grows with layers",
    ),
    Fault(
        LOSSES,
        "shares(chosen) * shares(share)",
        "shares(share) * shares(share)",
        OF_LOSSES,
        "balance looks at probabilities alone, not at choices",
    ),
    Fault(
        LOSSES,
        "jnp.mean(surprise, axis=0) * contrast.weight[:, None] * mask",
        "jnp.mean(surprise, axis=0) * mask",
        OF_LOSSES,
        "contrast weighs every record alike",
    ),
    Fault(
        STEP,
        "lambda g: g / count",
        'lambda g: g / batch["tokens"].size',
        OF_STEP,
        "gradients are divided by all tokens, padding included",
    ),
    Fault(
        STEP,
        "schedule(number - 1)",
        "schedule(number)",
        OF_STEP,
        "the learning rate that is told is the next step's",
    ),
    Fault(
        STEP,
        "(by_record + by_token) / 2**0.5",
        "by_record + by_token",
        OF_STEP,
        "router noise has twice the variance",
    ),
    Fault(
        STEP,
        "if not run.optim.load_balance:",
        "if True:",
        "tests/train/test_replicas.py::test_balance_is_that_of_the_whole_microbatch",
        "each replica balances experts alone",
    ),
    Fault(
        STEP,
        "jnp.array([False, True]) if alone",
        "jnp.array([True, False]) if alone",
        "tests/owner/test_pair.py",
        "a pair without coordination trains through the anchor's expert",
    ),
    Fault(
        "flexolmo_jax/train/optimizer.py",
        "optax.clip_by_global_norm(optim.clip)",
        "optax.clip(optim.clip)",
        "tests/train/test_optimizer.py",
        "gradients are clipped one by one",
    ),
    Fault(
        "flexolmo_jax/train/optimizer.py",
        "end_value=optim.lr * optim.final_fraction",
        "end_value=0.0",
        "tests/train/test_optimizer.py",
        "the learning rate ends at 0 whatever is asked for",
    ),
    Fault(
        "flexolmo_jax/train/optimizer.py",
        "b2=optim.beta2",
        "b2=optim.beta1",
        "tests/train/test_optimizer.py",
        "the second moment forgets as fast as the first",
    ),
    # --- model ---
    Fault(
        MOE,
        "jnp.where(jnp.arange(len(bias)) == 0, 0, bias)",
        "bias",
        f"{OF_MOE}/test_moe.py",
        "the anchor's expert has a bias",
    ),
    Fault(
        MOE,
        "jnp.minimum(group.bias[...].astype(jnp.float32), 0)",
        "group.bias[...].astype(jnp.float32)",
        f"{OF_MOE}/test_moe.py",
        "a bias may be positive",
    ),
    Fault(
        MOE,
        "return y.astype(x.dtype), probabilities, log_z",
        "return y.astype(x.dtype), used, log_z",
        f"{OF_STEP} {OF_MOE}/test_moe.py",
        "routers report what noise made of them",
    ),
    Fault(
        MOE,
        "jnp.where(p > 0, out.astype(jnp.float32) * p, 0)",
        "out.astype(jnp.float32) * p",
        f"{OF_MOE}/test_moe.py {OF_MOE}/test_switching_experts.py",
        "NaN in an excluded expert leaks",
    ),
    Fault(
        MOE,
        "jnp.sum(jnp.where(allowed, p * logits, 0), axis=-1)",
        "jnp.sum(p * logits, axis=-1)",
        f"{OF_MOE}/test_moe.py {OF_MOE}/test_switching_experts.py",
        "the entropy of a router with an excluded expert is NaN",
    ),
    Fault(
        "flexolmo_jax/model/layers.py",
        "old, heads_first, (layer, 0, 0, slot, 0)",
        "old, heads_first, (layer, 0, 0, 0, 0)",
        f"{OF_MOE}/test_transformer.py",
        "every token is written to the cache's first slot",
    ),
    Fault(
        "flexolmo_jax/model/transformer.py",
        "rematerialised(layer_step, choices.remat)",
        'rematerialised(layer_step, "full")',
        "tests/train/test_rematerialisation.py",
        "what is to be kept is computed again",
    ),
    # --- plan ---
    Fault(
        ROOFLINE,
        "2 if extent == size and size >= chip.wraps_at else 1",
        "2",
        "tests/plan/test_roofline.py",
        "a line of chips has the links of a ring",
    ),
    Fault(
        ROOFLINE,
        "2 * offloaded / (1e9",
        "offloaded / (1e9",
        "tests/plan",
        "what goes to the host does not come back",
    ),
    Fault(
        FLOPS,
        "again = recomputed + head + scores / 2",
        "again = recomputed + head",
        "tests/train/test_rematerialisation.py tests/plan",
        "q k is not computed again",
    ),
    Fault(
        REPORT,
        "(1 - model.n_active / model.n_experts) ** batch",
        "(1 - model.n_active / model.n_experts)",
        "tests/plan",
        "more prompts read no more experts",
    ),
    Fault(
        "flexolmo_jax/plan/collectives.py",
        '(2 if form == "all-reduce" else 1)',
        "1",
        "tests/plan/test_collectives.py",
        "a gather written as an all-reduce counts twice",
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose file has a word")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(word in fault.file for word in options.only)]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_of_the_tree(Path(folder))
        for tests in sorted({fault.tests for fault in chosen}):
            if not run_tests(tree, tests):
                print(f"tests fail without any fault: {tests}", file=sys.stderr)
                return 2
        for fault in chosen:
            start = time.perf_counter()
            seen = not passes_with(tree, fault)
            survivors += not seen
            took = f"{time.perf_counter() - start:.0f} s"
            print(
                f"{'seen' if seen else 'SURVIVES'}: {fault.what} ({fault.file}, {took})", flush=True
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} seen")
    return 1 if survivors else 0


def passes_with(tree: Path, fault: Fault) -> bool:
    """Whether the tests pass with this fault."""
    path = tree / fault.file
    source = path.read_text()
    if source.count(fault.line) != 1:
        raise SystemExit(f"{fault.file} has {source.count(fault.line)} times: {fault.line}")
    try:
        path.write_text(source.replace(fault.line, fault.instead))
        return run_tests(tree, fault.tests)
    finally:
        path.write_text(source)


if __name__ == "__main__":
    sys.exit(main())
