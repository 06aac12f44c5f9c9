"""The program that renders one template: `python rendering_process.py SECONDS MIB CHARACTERS`.

It reads {"template", "date", "asked"} from stdin and writes {"rendered"} or {"error"} to stdout,
both JSON. `asked` is a list of {"variables", "beginnings", "around"}, and `rendered` has a {"text",
"beginnings"} or {"error"} for each: rendering.py says what they are. An empty list lets the program
only read the template. It imports nothing of this package, so that it starts quickly. A template is
given what transformers 5.23 gives it (chat_template_utils.py).
"""

import json
import resource
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` marks what the assistant says. It changes nothing in the text but what it
    puts around it."""

    tags = {"generation"}  # noqa: RUF012 - the name and the type are Jinja's
    around = ("", "")

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_said")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        before, behind = self.around
        return before + caller() + behind


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore, which Python itself uses."""

    def __init__(*arguments: Any, **values: Any) -> None:  # so that `self` may be one of the names
        self, *given = arguments
        names = dict(*given, **values)
        for name in names:
            Namespace.check(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        Namespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r:.40}")


class Dictionaries:
    """Makes dictionaries. The class `dict` itself would lead further."""

    def __call__(self, *given: Any, **values: Any) -> dict[Any, Any]:
        return dict(*given, **values)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        return dict.fromkeys(*given)


def raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would write < as \\u003c."""
    how: dict[str, Any] = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
    return json.dumps(x, ensure_ascii=ensure_ascii, **how)


def environment_of(date: str) -> ImmutableSandboxedEnvironment:
    """What a template may use. It is told the date, or today where that is empty."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def strftime_now(form: str) -> str:
        return (datetime.fromisoformat(date) if date else datetime.now()).strftime(form)

    environment.filters["tojson"] = tojson
    given = {"dict": Dictionaries(), "namespace": Namespace}
    given |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.globals.update(given)
    return environment


def rendered(template: jinja2.Template, variables: Mapping[str, Any], characters: int) -> str:
    text = template.render(variables)
    if len(text) > characters:
        raise ValueError(f"it makes {len(text)} characters; expected at most {characters}")
    text.encode()  # raises for half a surrogate pair, which is not Unicode
    return text


def answered(template: jinja2.Template, one: Mapping[str, Any], characters: int) -> dict[str, Any]:
    """The text that is asked for, and the lengths of its beginnings."""
    variables = one["variables"]
    text, lengths = rendered(template, variables, characters), []
    for count, prompt in one["beginnings"]:
        first = {"messages": variables["messages"][:count], "add_generation_prompt": prompt}
        try:
            beginning = rendered(template, variables | first, characters)
        except MemoryError:
            raise
        except Exception:  # as where there is no message yet
            lengths.append(None)
        else:
            lengths.append(len(beginning) if text.startswith(beginning) else None)
    return {"text": text, "beginnings": lengths}


def reason(error: Exception, mib: int) -> dict[str, str]:
    if isinstance(error, MemoryError):
        return {"error": f"it takes more than {mib} MiB"}
    line = getattr(error, "lineno", None)
    where = f"line {line}: " if line else ""
    return {"error": where + (str(error) or type(error).__name__)[:300]}


def limit(seconds: int, mib: int) -> None:
    """Bounds this process, as far as the system can."""
    bounds = {"CPU": seconds, "AS": mib << 20, "FSIZE": 0, "CORE": 0}
    for name, most in bounds.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        _, allowed = resource.getrlimit(kind)
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        try:
            resource.setrlimit(kind, (most, most))
        except (OSError, ValueError):  # macOS has no bound on memory
            continue


def main() -> None:
    seconds, mib, characters = map(int, sys.argv[1:])
    limit(seconds, mib)
    request = json.loads(sys.stdin.read())
    each: list[dict[str, Any]] = []
    try:
        environment = environment_of(request["date"])
        template = environment.from_string(request["template"])
        (generation,) = (e for e in environment.extensions.values() if isinstance(e, Generation))
        for one in request["asked"]:
            generation.around = tuple(one["around"])
            try:
                each.append(answered(template, one, characters))
            except MemoryError:  # the texts before it may have taken it
                raise
            except Exception as error:
                each.append(reason(error, mib))
        answer: dict[str, Any] = {"rendered": each}
    except Exception as error:
        answer = reason(error, mib)
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
