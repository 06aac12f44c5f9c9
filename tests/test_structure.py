"""Which room may do what, where an import contract cannot tell: by the calls that stand in the
source."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "flexolmo_jax", ROOT / "kernels"
# Calls that take something away or give it another name, on modules of the standard library and on
# paths.
CHANGES = {
    "rmtree",
    "unlink",
    "rename",
    "renames",
    "replace",
    "remove",
    "removedirs",
    "rmdir",
    "move",
}
CHANGES |= {"link", "symlink", "hardlink_to", "symlink_to"}
OF_MODULES = {"os", "shutil"}
# these three are methods of strings, lists and others too
ON_PATHS = CHANGES - {"replace", "remove", "move"}


def modules(*without: str) -> list[Path]:
    paths = sorted(path for path in PACKAGE.rglob("*.py") if "kernels" not in path.parts)
    return [path for path in paths if path.relative_to(PACKAGE).parts[0] not in without]


def calls(path: Path) -> Iterator[tuple[int, str]]:
    """(line, "os.replace" or ".unlink") of every call of a changing function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, owner = node.func.attr, node.func.value
        if name in CHANGES and isinstance(owner, ast.Name) and owner.id in OF_MODULES:
            yield node.lineno, f"{owner.id}.{name}"
        elif name in ON_PATHS:
            yield node.lineno, f".{name}"


@pytest.mark.parametrize(
    "path", modules("storage"), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_nothing_outside_storage_removes_renames_or_links(path: Path):
    assert list(calls(path)) == []


def test_the_check_sees_each_kind_of_call(tmp_path: Path):
    source = tmp_path / "module.py"
    lines = (
        "os.replace(a, b)",
        "shutil.rmtree(a)",
        "(a / b).unlink()",
        "a.rename(b)",
        "os.link(a, b)",
        "'a'.replace('b', 'c')",
    )
    source.write_text("\n".join(lines))
    assert [name for _, name in calls(source)] == [
        "os.replace",
        "shutil.rmtree",
        ".unlink",
        ".rename",
        "os.link",
    ]
    assert {name for _, name in calls(PACKAGE / "storage" / "files.py")} >= {
        "os.replace",
        "shutil.rmtree",
        ".unlink",
        "os.link",
    }


# Where files are opened beside `storage/` and `exchange/`, and why no stranger's file comes in
# there unchecked.
READERS = {
    "plain_yaml.py": "the one reader of YAML: regular files of bounded size",
    "data/arrays.py": "maps records whose header and size have been checked",
    "data/fetch.py": "what an earlier fetch wrote into its folder",
    "data/packages.py": "archives of package registries, pinned by digest",
    "evals/report/page.py": "the page's template, from the package itself",
    "runtime/streams.py": "the null device",
    "reproduce": "a study's own results",
    "train/profile.py": "a profile that this process has just written",
}
OPENING = {"open", "read_text", "read_bytes", "memmap", "fromfile", "from_file", "load_file"}
LOADING = {"np", "numpy", "json", "yaml", "pickle", "torch"}  # whose `load` opens a file


def openings(path: Path) -> Iterator[tuple[int, str]]:
    """(line, call) of what opens files by itself, and not through storage/."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id == "open":
            yield node.lineno, "open"
        elif isinstance(function, ast.Attribute):
            owner = function.value.id if isinstance(function.value, ast.Name) else ""
            if owner == "gate":  # a coordinator's, of contributions
                continue
            if function.attr in OPENING or (function.attr == "load" and owner in LOADING):
                yield node.lineno, f"{owner}.{function.attr}"


def is_reader(path: Path) -> bool:
    name = path.relative_to(PACKAGE).as_posix()
    return any(name == reader or name.startswith(f"{reader}/") for reader in READERS)


@pytest.mark.parametrize(
    "path", modules("storage", "exchange"), ids=lambda path: path.relative_to(PACKAGE).as_posix()
)
def test_strangers_files_are_opened_in_storage_and_exchange_only(path: Path):
    found = [] if is_reader(path) else list(openings(path))
    assert found == [], "use storage/untrusted.py, or storage/paths.py for long ones"


def test_that_check_sees_each_kind_of_opening(tmp_path: Path):
    source = tmp_path / "module.py"
    lines = (
        "open(a)",
        "a.open('rb')",
        "(a / b).read_text()",
        "a.read_bytes()",
        "np.load(a)",
        "json.load(a)",
        "Tokenizer.load(a)",
        "json.loads(a)",
    )
    source.write_text("\n".join(lines))
    assert [line for line, _ in openings(source)] == [1, 2, 3, 4, 5, 6]
    assert all((PACKAGE / reader).exists() for reader in READERS)


def test_a_wheel_holds_every_file_of_the_package_that_is_no_module():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    declared = {
        PACKAGE.parent.joinpath(*package.split("."), name)
        for package, names in project["tool"]["setuptools"]["package-data"].items()
        for name in names
    }
    found = {path for path in PACKAGE.rglob("*") if path.suffix not in ("", ".py", ".pyc")}
    assert {path for path in found if "kernels" not in path.parts} == declared


@pytest.mark.parametrize(
    "path",
    [*modules(), *sorted(KERNELS.rglob("*.py"))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_modules_and_functions_fit_a_reader(path: Path):
    """At most 400 lines a module and 50 a function, docstrings included."""
    text = path.read_text()
    assert text.count("\n") <= 400
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > 50} == {}


# On an index the name could be anybody's.
FROM_AN_INDEX = re.compile(r"(?:flexolmo-jax|flexolmo_jax)\[[a-z,]+\](?! @)")


def test_nothing_tells_to_install_the_package_from_an_index():
    places = ("README.md", "CONTRIBUTING.md", "docs/*.md", "kernels/**/*", "flexolmo_jax/**/*.py")
    more = ("launch/**/*", "notebooks/*.py", "configs/**/*", "benchmarks/*.py", "Makefile")
    paths = [path for place in (*places, *more) for path in ROOT.glob(place) if path.is_file()]
    texts = {path: path.read_text() for path in paths if path.suffix not in (".pyc", ".ipynb")}
    assert [path for path, text in texts.items() if FROM_AN_INDEX.search(text)] == []
    # One function has the words that messages share.
    told = [path for path in modules() if "pip install -e" in texts[path]]
    assert told == [PACKAGE / "errors.py"]
    assert FROM_AN_INDEX.search("pip install 'flexolmo-jax[gcs,formats]'")
