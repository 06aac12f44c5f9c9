"""A compiled program's HLO text as data: computations, instructions, and how often loops run."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from flexolmo_jax.kernels.names import FURTHER_ROUNDS

COPIES = (
    "copy",
    "copy-start",
    "copy-done",
    "bitcast",
    "convert",
    "reshape",
    "transpose",
    "optimization-barrier",
)
# attributes that name other computations, beside the body and the condition of a loop
CALLS = (
    "calls",
    "to_apply",
    "true_computation",
    "false_computation",
    "branch_computations",
    "called_computations",
)
_WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclass
class Instruction:
    """`%name = type opcode(arguments), attributes`"""

    name: str
    type: str
    opcode: str
    arguments: str
    attributes: str

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.arguments)

    def attribute(self, key: str) -> str | None:
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match and match[1]

    def calls(self) -> Iterator[str]:
        """The computations that it runs, those of a loop aside."""
        for key in CALLS:
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
            yield from _NAME.findall(match[1]) if match else ()


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""
    parameters: dict[int, str] = field(default_factory=dict)

    def resolve(self, name: str) -> Instruction:
        """The instruction of this name, or what it is a copy of."""
        instruction = self.instructions[name]
        while instruction.opcode in COPIES and instruction.operands:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


@dataclass
class Program:
    computations: dict[str, Computation] = field(default_factory=dict)
    entry: str = ""

    @functools.cached_property
    def starts(self) -> dict[str, tuple[Computation, Instruction]]:
        """By the name of a computation that runs beside others, on the SparseCore, say: what starts
        it, and where."""
        return {
            name: (computation, instruction)
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode.endswith("-start")
            for name in instruction.calls()
        }

    def called(self, instruction: Instruction, key: str = "calls") -> Computation:
        return self.computations[instruction.attribute(key) or ""]

    def walk(
        self, is_sought: Callable[[Instruction], bool], *, one_pass: bool = False
    ) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that runs, where it stands, and how often it runs.

        A loop in which nothing is sought is passed over, and so are rounds of an exchange that even
        choices of experts do not need. `one_pass`: loops of the entry computation
        count as if they ran once. Raises ValueError for another loop whose length the text does
        not tell.
        """
        yield from self._walk(self.entry, 1, is_sought, one_pass)

    def _walk(
        self, name: str, runs: int, is_sought: Callable[[Instruction], bool], one_pass: bool = False
    ) -> Iterator[tuple[Instruction, Computation, int]]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield instruction, computation, runs
            if instruction.opcode != "while":
                for called in instruction.calls():
                    yield from self._walk(called, runs, is_sought)
                continue
            body = instruction.attribute("body") or ""
            if FURTHER_ROUNDS not in instruction.attributes and self._holds(body, is_sought, set()):
                count = 1 if one_pass else _trip_count(self, computation, instruction)
                yield from self._walk(body, runs * count, is_sought)

    def _holds(self, name: str, is_sought: Callable[[Instruction], bool], seen: set[str]) -> bool:
        """Whether something sought is in a computation, or in one that it names."""
        if name in seen or name not in self.computations:
            return False
        seen.add(name)
        return any(
            is_sought(instruction)
            or any(
                self._holds(named, is_sought, seen)
                for named in _NAME.findall(instruction.attributes)
            )
            for instruction in self.computations[name].instructions.values()
        )


def parse(hlo: str) -> Program:
    program, current = Program(), None
    for line in hlo.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = program.computations[header[2]] = Computation(header[2])
                program.entry = header[2] if header[1] else program.entry
        # "}}" closes attributes that hold line breaks
        elif line.startswith("}") and not line.startswith("}}"):
            current = None
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT"):
                current.root = instruction.name
            if instruction.opcode == "parameter":
                current.parameters[int(instruction.arguments)] = instruction.name
    return program


def bytes_of(type_: str) -> int:
    """Of an array or a tuple of arrays."""
    total = 0
    for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", type_)):
        width = _WIDTHS.get(dtype)
        if width is None:
            bits = re.search(r"\d+", dtype)
            width = int(bits[0]) / 8 if bits else 0
        total += math.prod(numbers(shape)) * width
    return int(total)


def first_array(type_: str) -> str:
    """The first array of a type, as f32[4096,256], without its order in memory."""
    match = _ARRAY.search(type_)
    return match[0] if match else ""


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    text = re.sub(r"/\*.*?\*/", "", line[match.end() :])
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, rest = text[end + 1 :].partition("(")
    close = _closing("(" + rest) - 1
    return Instruction(match[1], text[:end], opcode.strip(), rest[:close], rest[close + 1 :])


def _closing(text: str) -> int:
    """Where the parenthesis that a text starts with is closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _trip_count(program: Program, around: Computation, loop: Instruction) -> int:
    """How often a loop runs, of the kind `for (i = start; i < end; i += step)`."""
    known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.attributes)
    if known:
        return int(known[1])
    compare, sides = _comparison(program, program.called(loop, "condition"))
    is_less = compare.opcode == "compare" and compare.attribute("direction") == "LT"
    if is_less and [side.opcode for side in sides] == ["get-tuple-element", "constant"]:
        index, end = int(sides[0].attribute("index") or -1), int(sides[1].arguments)
        start = _integer(program, around, _element(around, loop.operands[0], index), {})
        if start is not None:
            after = _after_a_pass(program, program.called(loop, "body"), index, start)
            if after is not None and after > start:
                return max(0, math.ceil((end - start) / (after - start)))
    raise ValueError(f"the loop {loop.name} of {around.name} does not tell how often it runs")


def _comparison(program: Program, condition: Computation) -> tuple[Instruction, list[Instruction]]:
    """A condition's comparison, and what it compares."""
    compare = condition.resolve(condition.root)
    operands = [condition.resolve(name) for name in compare.operands]
    if compare.opcode != "fusion":
        return compare, operands
    inner = program.called(compare)  # the comparison may be wrapped
    compare = inner.resolve(inner.root)
    sides = [inner.resolve(name) for name in compare.operands]
    return compare, [
        operands[int(side.arguments)] if side.opcode == "parameter" else side for side in sides
    ]


def _element(computation: Computation, name: str, index: int) -> str:
    """The name of an element of a tuple."""
    instruction = computation.resolve(name)
    return instruction.operands[index] if instruction.opcode == "tuple" else name


def _after_a_pass(program: Program, body: Computation, index: int, value: int) -> int | None:
    """What an element of a loop's state becomes in one pass."""
    root = body.instructions[body.root]
    if root.opcode != "tuple":
        return None
    known = {(body.parameters[0], index): value}
    return _integer(program, body, root.operands[index], known)


def _integer(program: Program, computation: Computation, name: str, known: Mapping) -> int | None:
    """The value of an integer scalar made of constants and of what is known, else None.

    `known`: by the name of a parameter, or (its name, an index) of a tuple's element.
    """
    instruction = computation.resolve(name)
    match instruction.opcode:
        case "constant":
            is_integer = re.fullmatch(r"-?\d+", instruction.arguments)
            return int(instruction.arguments) if is_integer else None
        case "get-tuple-element":
            return known.get((instruction.operands[0], int(instruction.attribute("index") or -1)))
        case "parameter":
            return known.get(instruction.name)
        case "add" | "subtract" | "multiply":
            a, b = (_integer(program, computation, name, known) for name in instruction.operands)
            if a is None or b is None:
                return None
            return {"add": a + b, "subtract": a - b, "multiply": a * b}[instruction.opcode]
        case "fusion":
            inner = program.called(instruction)
            values = {
                inner.parameters[i]: _integer(program, computation, name, known)
                for i, name in enumerate(instruction.operands)
            }
            return _integer(program, inner, inner.root, values)
    return None
