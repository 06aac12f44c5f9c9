"""From YAML and overrides to checked configs, and back."""

import copy
import dataclasses
import datetime
import difflib
import json
import types
import typing
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from flexolmo_jax.errors import UserError
from flexolmo_jax.plain_yaml import parse_yaml, read_yaml, to_yaml

from .model import PRESETS, ModelConfig
from .run import Date, RunConfig
from .section import expect
from .unused import refuse_unused

T = TypeVar("T")
LEVELS = 8  # of sections in a key, more than any has


# What YAML and JSON files here are, by some keys that are theirs.
RUN, JOB = "a run's config", "a launcher's job"
KINDS = {
    RUN: {"run", "model", "data", "train", "optim", "pair", "router", "mesh"},
    JOB: {"owner", "project", "zone", "bucket", "service_account", "tpu", "image", "run"},
    "a study": {"domains", "public", "seeds", "anchor", "dense", "joint", "btx", "ablations"},
    "a plan": {"topology", "slices", "program", "fits", "peak_bytes"},
    "a Kubernetes object": {"apiVersion", "kind", "metadata", "spec"},
    "a SkyPilot task": {"resources", "envs", "setup", "run"},
}


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run's YAML, applies `section.key=value` overrides and checks the result."""
    run = read_config(path, overrides)
    refuse_unused(run)
    return run


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `load_config`, of what a run wrote: an earlier version may have let in what has no
    effect."""
    tree = read_yaml(path)
    expect_kind(RUN, tree, str(path))
    return _checked(tree, overrides)


def expect_kind(kind: str, tree: Any, what: str = "it") -> None:
    """Raises UserError where a file has two or more keys of another kind, and more than of this."""
    if not isinstance(tree, dict):
        return
    found = {one: len(keys & tree.keys()) for one, keys in KINDS.items()}
    likely = max(found, key=lambda one: found[one])
    if likely != kind and found[likely] > max(1, found[kind]):
        own = f"; that job's is {tree.get('config')!r:.80}" if (likely, kind) == (JOB, RUN) else ""
        raise UserError(f"{what} seems to be {likely}; expected {kind}{own}")


def resolve(tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A checked RunConfig from a nested dict (which is left as it was) and overrides."""
    run = _checked(tree, overrides)
    refuse_unused(run)
    return run


def _checked(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    if not isinstance(tree, dict):
        raise UserError(
            f"the config is {tree!r:.80}; expected sections: {', '.join(_fields(RunConfig))}"
        )
    given = tree
    tree = override(tree, overrides)
    model = tree.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise UserError(
                f"unknown model.preset {preset!r:.80}; expected one of {', '.join(PRESETS)}"
            )
        tree["model"] = PRESETS[preset] | model
    _refuse_privacy(tree.get("pair"))
    config = dataclasses.replace(build(RunConfig, tree), stated=tuple(tree.get("model") or ()))
    _refuse_section(config, given, overrides)
    config.check()
    return config


def override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of a nested dict with `section.key=value` set, whose values are YAML."""
    tree = copy.deepcopy(tree)
    for text in overrides:
        key, equals, value = text.partition("=")
        *branches, leaf = key.split(".")
        if not equals or len(branches) > LEVELS:
            raise UserError(f"--set got {text!r:.200}; expected section.key=value")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise UserError(f"--set got {text!r:.200}, but {branch!r:.80} is not a section")
        try:
            node[leaf] = parse_yaml(value)
        except ValueError as error:
            raise UserError(
                f"--set got {text!r:.200}, whose value is not valid YAML ({error}); quote it"
            ) from None
    return tree


def section_of(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a nested dict, {} where there is none. Raises UserError for something else."""
    section = tree.get(name)
    expect(isinstance(section, dict | None), name, section, "a section with keys")
    return section or {}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a user says of a run whose other keys are filled in: a YAML file and overrides."""

    config: Path | None = None
    overrides: Sequence[str] = ()

    def tree(self, default: dict[str, Any]) -> dict[str, Any]:
        """The YAML file, or where none is given the default."""
        return read_yaml(self.config) if self.config else default

    def say(self, tree: dict[str, Any], section: str, key: str) -> bool:
        """Whether the file or an override gives a key a value of its own."""
        given = f"{section}.{key}="
        return key in section_of(tree, section) or any(
            override.startswith(given) for override in self.overrides
        )

    def run(self, tree: dict[str, Any], filled: Collection[str], *more: str) -> RunConfig:
        """The checked config of a tree, and of more overrides. Raises UserError for an override of
        a key that is `filled` in: what was checked would not be what runs."""
        for override in self.overrides:
            key = override.partition("=")[0]
            if any(key == each or each.startswith(f"{key}.") for each in filled):
                raise UserError(
                    f"--set got {override!r:.200}; expected another key: {key!r:.80} follows from"
                    " the command's own arguments; leave it out"
                )
        return resolve(tree, [*self.overrides, *more])


DEFAULTS = Settings()


def build(cls: type[T], tree: Any, at: str = "") -> T:
    """A dataclass from a nested dict. Raises UserError for values of another type than the field's,
    and for unknown keys, with the nearest known one."""
    if not isinstance(tree, dict):
        raise UserError(
            f"{at or 'the config'} is {tree!r:.80}; expected a section with keys"
            f" {', '.join(_fields(cls))}"
        )
    values = {}
    for key, value in tree.items():
        path = f"{at}.{key}" if at else str(key)
        if key not in _fields(cls):
            near = difflib.get_close_matches(str(key)[:80], _fields(cls), n=1, cutoff=0.5)
            known = f"expected one of {', '.join(_fields(cls))}"
            prefix = f"{at}." if at else ""
            hint = f"did you mean {prefix + near[0]!r}?" if near else known
            raise UserError(f"unknown config key {path!r:.80}; {hint}")
        values[key] = _converted(value, typing.get_type_hints(cls)[key], path)
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested plain dicts, as YAML and JSON files of runs, anchors and models hold
    it."""
    tree = {
        name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for name, field in _fields(type(config)).items()
        if (value := getattr(config, name)) != field.default or not field.metadata.get("later")
    }
    return json.loads(json.dumps(tree, default=dataclasses.asdict))


def dump_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    tree = {key: value for key, value in to_dict(config).items() if value is not None}
    if config.run in ("pair", "router"):  # the rest is that of what they start from
        usual = to_dict(ModelConfig())
        tree["model"] = {k: v for k, v in tree["model"].items() if v != usual.get(k)}
    return to_yaml(tree)


def _refuse_section(config: RunConfig, given: dict[str, Any], overrides: Sequence[str]) -> None:
    """Raises UserError for an override that opens a section of another kind of run."""
    for text in overrides:
        section = text.partition("=")[0].partition(".")[0]
        is_of_another = section in {"pair", "router"} - {config.run} and section not in given
        if is_of_another and getattr(config, section) is not None:
            raise UserError(
                f"--set (of a job: set) got {text!r:.200}, but run is {config.run}, which has no"
                f" section {section!r}; leave it out, or give a config of run: {section}"
            )


def _refuse_privacy(pair: Any) -> None:
    """Takes out an empty `privacy`, as runs of earlier versions have it. Raises UserError for one
    that claims something."""
    if isinstance(pair, dict) and (claim := pair.pop("privacy", None)) is not None:
        raise UserError(
            f"pair.privacy is {claim!r:.80}; training here has no differential privacy yet, so that"
            " no contribution may claim it; remove the key"
        )


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls) if f.compare}


def _converted(value: Any, hint: Any, at: str) -> Any:
    """A value of YAML as a field of this type has it. Raises UserError where it cannot be one."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):  # only `Section | None` is used
        return None if value is None else _converted(value, arguments[0], at)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return build(hint, value, at)
    if origin is tuple:
        expect(isinstance(value, (list, tuple)), at, value, "a list")
        return tuple(_converted(item, arguments[0], f"{at}[{i}]") for i, item in enumerate(value))
    if origin is Literal:
        expect(value in arguments, at, value, f"one of {', '.join(arguments)}")
        return value
    if hint is Date:
        return _scalar(value.isoformat() if isinstance(value, datetime.date) else value, str, at)
    return _scalar(value, hint, at)


def _scalar(value: Any, kind: type, at: str) -> Any:
    if kind is float and isinstance(value, str):  # in quotes, as tools write it
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is int:
        expect(abs(value) < 2**63, at, value, "a number of 64 bits")
        value = float(value) if kind is float else value
    # True is an int for Python, but not for people.
    is_kind = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    expect(is_kind, at, value, f"a value of type {kind.__name__}")
    if isinstance(value, str):
        expect(_is_unicode(value), at, value, "Unicode without the character 0")
    return value


def _is_unicode(text: str) -> bool:
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which "\ud800" in quotes makes in YAML
        return False
