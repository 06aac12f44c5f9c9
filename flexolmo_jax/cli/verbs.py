"""What a verb is, and the parser of all of them.

A verb's help, example and options stand above the function that it runs. The function imports what
it needs: `flexolmo --help` imports no JAX.
"""

import argparse
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

from flexolmo_jax.errors import UserError, printable
from flexolmo_jax.runtime.environment import package_version
from flexolmo_jax.storage.locks import alone

Run = Callable[[argparse.Namespace], dict[str, Any]]
GROUPS = {
    "data": "fetch and prepare text",
    "tokenizer": "train a tokenizer",
    "anchor": "fetch an open model as an anchor",
}


class Option(NamedTuple):
    """An argument of a verb, as `argparse` takes it."""

    names: tuple[str, ...]
    settings: dict[str, Any]
    group: tuple[str, str] | None = None  # title and description in the verb's help

    @property
    def default(self) -> Any:
        is_flag = self.settings.get("action") == "store_true"
        return self.settings.get("default", False if is_flag else None)


class Verb(NamedTuple):
    name: str  # one word, or a group and a word, as "data fetch"
    help: str
    example: str
    options: tuple[Option, ...]
    run: Run  # nobody else writes its `out` at the same time


def option(*names: str, group: tuple[str, str] | None = None, **settings: Any) -> Option:
    return Option(names, settings, group)


def verb(
    name: str, help: str, example: str, *options: Option, joins: bool = False
) -> Callable[[Run], Verb]:
    """Makes a verb of the function below.

    `joins`: several processes may run it for one `out`, which it locks itself once they have met.
    """
    return lambda run: Verb(name, help, example, options, run if joins else _alone(run))


def refuse_given(args: argparse.Namespace, options: Iterable[Option], why: str) -> None:
    """Raises UserError for one of these options that was given: it has no effect here."""
    for option in options:
        name = option.names[-1]
        key = option.settings.get("dest", name.removeprefix("--").replace("-", "_"))
        if getattr(args, key) != option.default:
            raise UserError(f"{name} has no effect: {why}; leave it out")


def _alone(run: Run) -> Run:
    def run_alone(args: argparse.Namespace) -> dict[str, Any]:
        if getattr(args, "out", None) is None:
            return run(args)
        with alone(args.out):
            return run(args)

    return run_alone


def parser_of(modules: Iterable[ModuleType]) -> argparse.ArgumentParser:
    """The parser of the verbs of these modules, in order. The function comes back as `run_verb`."""
    main = _Parser(
        prog="flexolmo", description="One language model from organisations that do not share data."
    )
    main.add_argument("--version", action=_Version, nargs=0, help="print it and exit")
    top = main.add_subparsers(required=True, metavar="VERB")
    groups = {}
    values = (value for module in modules for value in vars(module).values())
    for verb in (value for value in values if isinstance(value, Verb)):
        group, _, word = verb.name.rpartition(" ")
        if group and group not in groups:
            text = GROUPS[group]
            parent = top.add_parser(group, help=text, description=text)
            groups[group] = parent.add_subparsers(required=True, metavar="VERB")
        _add(groups.get(group, top), word, verb)
    return main


def _add(to: Any, word: str, verb: Verb) -> None:
    added = to.add_parser(
        word,
        help=verb.help,
        description=verb.help,
        epilog=f"example:\n  flexolmo {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    added.add_argument("--debug", action="store_true", help="show a traceback with an error")
    added.set_defaults(run_verb=verb.run)
    groups: dict[Any, Any] = {None: added}
    for names, settings, group in verb.options:
        if group and group not in groups:
            groups[group] = added.add_argument_group(*group)
        groups[group].add_argument(*names, **settings)


class _Version(argparse.Action):
    """Looks the version up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"flexolmo-jax {package_version()}")
        parser.exit()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))
