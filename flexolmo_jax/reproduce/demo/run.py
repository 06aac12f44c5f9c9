"""Runs a demo: every step is a command of `flexolmo`, but for the scores and the report.

    DIR/demo.yaml   DIR/commands.sh   DIR/text   DIR/anchor   DIR/pair.yaml   DIR/contributions
    DIR/merged ...   DIR/results.txt   DIR/report.html

A coordinator fetches an anchor. Owners train an expert each, on text that they keep. The
coordinator merges the experts, and an owner leaves. It may be stopped and started again.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexolmo_jax.data.changes import changed_documents
from flexolmo_jax.errors import UserError
from flexolmo_jax.storage.files import make_folder, write_text
from flexolmo_jax.storage.locks import alone_at
from flexolmo_jax.storage.paths import children

from ..running import Cell, Command, run_cell, run_cells
from .results import lines, score, write_results
from .spec import CONTROL, Demo, Places, parse_demo, with_text


@alone_at("root")
def run_demo(content: str, root: Path) -> dict[str, Any]:
    """Runs the demo of a YAML in a directory and returns what its results.json holds.

    Raises UserError for a directory that holds anything else, and while another process writes it;
    RunError if a command fails.
    """
    spec, places = parse_demo(content), Places(root)
    make_folder(root)
    if not places.spec.exists():
        if others := [path.name for path in children(root)]:
            raise UserError(
                f"{root} holds {others[0]}, but no demo; give a new or an empty directory"
            )
        write_text(places.spec, content)
    elif parse_demo(places.spec.read_text()) != spec:
        raise UserError(f"{root} holds another demo; remove it, or give a new directory")
    run_cells(dict(_text_cell(spec, places)), root, spec.workers, __name__)
    _check_documents(with_text(spec, places), places)
    steps = cells(spec, places)
    typed = [str(step.do) for step in steps.values() if isinstance(step.do, Command)]
    write_text(places.commands, "".join(f"{line}\n" for line in typed))
    write_text(places.pair, json.dumps({"run": "pair", **spec.pair}, indent=1) + "\n")
    run_cells(steps, root, spec.workers, __name__)
    return json.loads(places.results.read_text())


def _check_documents(spec: Demo, places: Places) -> None:
    """Raises UserError where text is not what an expert was trained on."""
    for name, domain in {CONTROL: spec.public, **{name: name for name in spec.domains}}.items():
        data, text = places.data(name), places.documents(domain)
        is_made = data.exists() and text.exists()
        if is_made and (changes := changed_documents(data, [text])):
            raise UserError(
                f"{data} was made from other documents than {text} ({changes}); restore them, or"
                " give a new --out"
            )


def cells(spec: Demo, places: Places) -> dict[str, Cell]:
    """By name, each after those that it needs. Before the text is there, only that."""
    found = dict(_text_cell(spec, places))
    if not found["text"].is_done:
        return found
    spec = with_text(spec, places)
    found |= dict(_training_cells(spec, places))
    found |= dict(_merging_cells(spec, places))
    for line in lines(spec, places):
        do = partial(score, spec, places, line)
        found[f"score-{line.name}"] = Cell(places.scores(line.name), line.needs, do)
    needs = [name for name in found if name.startswith(("score-", "never-"))]
    do = partial(write_results, spec, places)
    found["report"] = Cell(places.report, tuple(needs), do)
    return found


def _text_cell(spec: Demo, places: Places) -> Iterator[tuple[str, Cell]]:
    domains = [*spec.domains, spec.public]
    wanted = [word for domain in domains for word in ("--domain", domain)]
    size = ["--max-mb", str(spec.max_mb)]
    last = places.documents(domains[-1])  # they are written in this order
    yield "text", _command(last, (), "data", "fetch", last.parent, *wanted, *size)


def _training_cells(spec: Demo, places: Places) -> Iterator[tuple[str, Cell]]:
    """The anchor, the owners' experts and the control."""
    length = ["--seq-len", str(spec.seq_len)]
    yield (
        "anchor",
        _command(places.anchor, ("text",), "anchor", "fetch", spec.anchor, places.anchor, *length),
    )
    for name in spec.domains:
        key = places.keys / name
        yield f"key-{name}", _command(key, (), "keygen", key)
        own = ["--set", f"pair.owner={name}", "--sign-key", key]
        needs = ("anchor", f"key-{name}")
        yield f"expert-{name}", _expert(places, name, name, needs, own)
    alone = ["--set", "pair.public_share=0"]  # there is nothing to tell public text from
    yield CONTROL, _expert(places, CONTROL, spec.public, ("anchor",), alone)


def _expert(
    places: Places, name: str, domain: str, needs: tuple[str, ...], options: Sequence[object]
) -> Cell:
    out = places.contribution(name)
    data = ["--anchor", places.anchor, "--documents", places.documents(domain)]
    how = ["--name", name, "--config", places.pair, *options, "--out", out]
    return _command(out, needs, "contribute", *data, *how)


def _merging_cells(spec: Demo, places: Places) -> Iterator[tuple[str, Cell]]:
    """Every expert merged; without the leaver's; and without it from the beginning."""
    everyone = [places.contribution(name) for name in spec.domains]
    anchor, trust = ["--anchor", places.anchor], ["--trust", places.keys]
    needs = tuple(f"expert-{name}" for name in spec.domains)
    active = ["--active", spec.active]
    words = [*anchor, *everyone, *trust, *active, "--out", places.merged]
    yield "merged", _command(places.merged, needs, "merge", *words)
    leaver, out = spec.leaver, places.without(spec.leaver)
    left = ["--expert", leaver, "--out", out]
    yield f"merged-{leaver}", _command(out, ("merged",), "opt-out", places.merged, *left)
    never = places.never(leaver)
    words = [*anchor, *everyone[:-1], *trust, *active, "--out", never]
    yield f"never-{leaver}", _command(never, needs[:-1], "merge", *words)


def _command(output: Path, needs: tuple[str, ...], *words: object) -> Cell:
    return Cell(output, needs, Command(tuple(map(str, words))))


if __name__ == "__main__":
    at, name = Places(Path(sys.argv[1])), sys.argv[2]
    sys.exit(run_cell(cells(parse_demo(at.spec.read_text()), at)[name]))
