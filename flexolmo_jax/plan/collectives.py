"""What a compiled program moves between devices, read from its HLO text.

Every collective is counted as often as the loops around it run. The compiler overlaps many gathers
and reductions with the products that they feed: as rings of `collective-permute` in a loop of their
own, counted here as the gather or reduction that they are, move by move; or as one gather whose
parts are spread over another loop, a chain of one channel. A gather over a whole torus is written
as an all-reduce of arrays that are 0 but for each device's own part, a reduce-scatter as an
all-reduce of which each device cuts out its part. They count as what they are too, and say so.
Between slices the runtime does the exchange: the program only sends to it and receives.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
_WIDTHS = {"pred": 1, "token": 0, "opaque": 0, "f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([0-9,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_COPIES = (
    "copy",
    "copy-start",
    "copy-done",
    "bitcast",
    "convert",
    "reshape",
    "transpose",
    "optimization-barrier",
)
_RING = re.compile(r"windowed_dot_general_body_(ag|rs)")
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,:]+)\}x[^"]*",_xla_megascale_transfer_type="(\w+)"'
)
_RINGS = {"ag": "all-gather", "rs": "reduce-scatter"}


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes that it runs over
    size: int  # devices that take part together
    # each device receives in one run: an all-reduce counts twice, as a reduce-scatter and a gather
    bytes: float
    runs: int  # times a step
    # "" as it stands; "ring": a move of a ring that is overlapped with a product; "all-reduce":
    # written as one
    form: str
    source: str  # what it comes from: the operation's name in the traced program
    operand: str  # the first operand's HLO type, as f32[4096,256]

    @property
    def total(self) -> float:
        """Bytes that each device receives in a step."""
        return self.bytes * self.runs


@dataclass
class _Instruction:
    name: str
    type: str
    opcode: str
    operands: list[str]
    rest: str  # attributes
    arguments: str  # text between the parentheses

    def attribute(self, key: str) -> str | None:
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.rest)
        return match and match[1]


@dataclass
class _Computation:
    name: str
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""
    parameters: dict[int, str] = field(default_factory=dict)


def collectives(hlo: str, mesh: Mapping[str, int], *, one_pass: bool = False) -> list[Collective]:
    """All collectives of a partitioned program, a start and its done as one. `mesh`: axis sizes in
    the order of its devices.

    `one_pass`: of the program's own loop, whose length its arguments decide, count one pass. Raises
    ValueError for any other loop around a collective whose length the text does not tell.
    """
    computations, entry = _parse(hlo)
    found: dict[tuple[str, int], Collective] = {}
    for instruction, computation, runs in _walk(computations, entry, 1, one_pass):
        kind = _kind(instruction)
        if kind is None:
            continue
        if between := _BETWEEN_SLICES.search(instruction.rest):
            size, axes = _count(between[1]), (next(iter(mesh)),)  # slices lie along the first axis
        else:
            groups = _groups(instruction, math.prod(mesh.values()))
            size, axes = len(groups[0]), _axes(groups, mesh)
        if size == 1:
            continue
        chained = "chain_id=" in instruction.rest and instruction.attribute("channel_id")
        name = chained or f"{computation.name}/{instruction.name}"
        op = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
        operands = (
            instruction.operands[:1]
            if kind == "collective-permute" or between
            else instruction.operands
        )
        for i, operand in enumerate(operands):
            meaning, form = _meaning(computations, computation, instruction, kind, i)
            type_ = computation.instructions[operand].type
            one = Collective(
                kind=meaning,
                axes=axes,
                size=size,
                bytes=_received(kind, _bytes(type_), size) / (2 if form == "all-reduce" else 1),
                runs=runs,
                form=form,
                source=op[1].replace("\\'", "'") if op else "",
                operand=_array(type_),
            )
            # the parts of a chain run more often than it starts
            if (name, i) not in found or runs < found[name, i].runs:
                found[name, i] = one
    # The first and last moves of a ring stand outside of its loop.
    rings: dict[str, set[str]] = {}
    for one in found.values():
        if one.form == "ring":
            rings.setdefault(one.source, set()).add(one.kind)
    return [
        (
            dataclasses.replace(one, kind=next(iter(rings[one.source])), form="ring")
            if one.kind == "collective-permute" and len(rings.get(one.source, ())) == 1
            else one
        )
        for one in found.values()
    ]


def _kind(instruction: _Instruction) -> str | None:
    """One of KINDS, where an instruction starts a collective."""
    if between := instruction.opcode == "send" and _BETWEEN_SLICES.search(instruction.rest):
        kind = between[2].lower().replace("_", "-")
        return kind if kind in KINDS else "collective-permute"
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _count(text: str) -> int:
    """Of numbers and ranges: 0,2:4 are four."""
    return sum(
        int(last or first) - int(first) + 1
        for first, _, last in (part.partition(":") for part in text.split(","))
    )


def _meaning(
    computations: dict[str, _Computation],
    computation: _Computation,
    instruction: _Instruction,
    kind: str,
    operand: int,
) -> tuple[str, str]:
    """(kind, form) of what a collective does to one of its operands."""
    if kind == "collective-permute":
        ring = _RING.search(computation.name)
        return (_RINGS[ring[1]], "ring") if ring else (kind, "")
    if kind != "all-reduce" or instruction.opcode == "send":
        return kind, ""
    made_by = _origin(computations, computation, instruction.operands[operand])
    if made_by == "dynamic-update-slice":
        return "all-gather", "all-reduce"
    users = _users(computation, instruction, operand)
    if users and all(_cuts(computations, user, name) for user, name in users):
        return "reduce-scatter", "all-reduce"
    return kind, ""


def _origin(computations: dict[str, _Computation], computation: _Computation, name: str) -> str:
    """The operation that makes an array, behind copies and inside fusions."""
    instruction = _resolve(computation, name)
    if instruction.opcode == "fusion":
        inner = computations[instruction.attribute("calls") or ""]
        return _origin(computations, inner, inner.root)
    return instruction.opcode


def _users(
    computation: _Computation, instruction: _Instruction, output: int
) -> list[tuple[_Instruction, str]]:
    """Who reads an output of an instruction, with the name they read it by."""
    names = {instruction.name}
    if instruction.type.startswith("("):
        elements = [
            i
            for i in computation.instructions.values()
            if i.opcode == "get-tuple-element" and instruction.name in i.operands
        ]
        names = {i.name for i in elements if i.attribute("index") == str(output)}
    found = []
    for other in computation.instructions.values():
        for name in names & set(other.operands):
            if other.opcode in _COPIES:
                names.add(other.name)
            elif other.opcode != "get-tuple-element":
                found.append((other, name))
    return found


def _cuts(computations: dict[str, _Computation], user: _Instruction, name: str) -> bool:
    """Whether a reader of an array reads a slice of it that depends on the device."""
    if user.opcode == "fusion":
        inner = computations[user.attribute("calls") or ""]
        parameter = inner.parameters[user.operands.index(name)]
        readers = _users(inner, inner.instructions[parameter], 0)
        return bool(readers) and all(_cuts(computations, reader, read) for reader, read in readers)
    return user.opcode == "dynamic-slice"


def _received(kind: str, operand: int, size: int) -> float:
    """Bytes that a device receives, of an operand of so many bytes."""
    match kind:
        case "all-gather":
            return operand * (size - 1)
        case "all-reduce":
            return 2 * operand * (size - 1) / size
        case "collective-permute" | "collective-broadcast":
            return operand
    return operand * (size - 1) / size


def _walk(
    computations: dict[str, _Computation], name: str, runs: int, one_pass: bool = False
) -> Iterator[tuple[_Instruction, _Computation, int]]:
    """Every instruction that runs, where it stands, and how often it runs. `one_pass`: of the loops
    that stand here."""
    computation = computations[name]
    for instruction in computation.instructions.values():
        yield instruction, computation, runs
        if instruction.opcode == "while":
            body = instruction.attribute("body") or ""
            if _has_collectives(computations, body):
                count = 1 if one_pass else _trip_count(computations, computation, instruction)
                yield from _walk(computations, body, runs * count)
            continue
        for key in (
            "calls",
            "to_apply",
            "true_computation",
            "false_computation",
            "branch_computations",
            "called_computations",
        ):
            match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", instruction.rest)
            for called in _NAME.findall(match[1]) if match else ():
                yield from _walk(computations, called, runs)


def _has_collectives(
    computations: dict[str, _Computation], name: str, seen: set[str] | None = None
) -> bool:
    seen = set() if seen is None else seen
    if name in seen or name not in computations:
        return False
    seen.add(name)
    for instruction in computations[name].instructions.values():
        if _kind(instruction):
            return True
        if any(
            _has_collectives(computations, called, seen)
            for called in _NAME.findall(instruction.rest)
        ):
            return True
    return False


def _trip_count(
    computations: dict[str, _Computation], around: _Computation, loop: _Instruction
) -> int:
    """How often a loop runs, of the kind `for (i = start; i < end; i += step)`."""
    known = re.search(r"known_trip_count[^0-9]*(\d+)", loop.rest)
    if known:
        return int(known[1])
    condition, body = (computations[loop.attribute(key) or ""] for key in ("condition", "body"))
    compare = _resolve(condition, condition.root)
    if compare.opcode == "fusion":  # the comparison may be wrapped
        inner = computations[compare.attribute("calls") or ""]
        operands = [_resolve(condition, name) for name in compare.operands]
        compare, of = _resolve(inner, inner.root), inner
        sides = [_through(of, name, operands) for name in compare.operands]
    else:
        sides = [_resolve(condition, name) for name in compare.operands]
    direction = compare.attribute("direction")
    if (
        compare.opcode == "compare"
        and direction == "LT"
        and sides[0].opcode == "get-tuple-element"
        and sides[1].opcode == "constant"
    ):
        index, end = int(sides[0].attribute("index") or -1), int(sides[1].arguments)
        start = _integer(computations, around, _element(around, loop.operands[0], index), {})
        root = body.instructions[body.root]
        if start is not None and root.opcode == "tuple":
            parameter = body.parameters[0]
            after = _integer(computations, body, root.operands[index], {(parameter, index): start})
            if after is not None and after > start:
                return max(0, math.ceil((end - start) / (after - start)))
    raise ValueError(f"the loop {loop.name} of {around.name} does not tell how often it runs")


def _through(computation: _Computation, name: str, operands: list[_Instruction]) -> _Instruction:
    """What a name inside a fusion stands for, outside of it where it is a parameter."""
    instruction = _resolve(computation, name)
    return (
        operands[int(instruction.arguments)] if instruction.opcode == "parameter" else instruction
    )


def _resolve(computation: _Computation, name: str) -> _Instruction:
    """Behind copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in _COPIES and instruction.operands:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _element(computation: _Computation, name: str, index: int) -> str:
    """The name of an element of a tuple."""
    instruction = _resolve(computation, name)
    return instruction.operands[index] if instruction.opcode == "tuple" else name


def _integer(
    computations: dict[str, _Computation], computation: _Computation, name: str, known: dict
) -> int | None:
    """The value of an integer scalar made of constants and of what is known; None where it is made
    of anything else."""
    instruction = _resolve(computation, name)
    match instruction.opcode:
        case "constant":
            return (
                int(instruction.arguments)
                if re.fullmatch(r"-?\d+", instruction.arguments)
                else None
            )
        case "get-tuple-element":
            return known.get((instruction.operands[0], int(instruction.attribute("index") or -1)))
        case "parameter":
            return known.get(instruction.name)
        case "add" | "subtract" | "multiply":
            a, b = (
                _integer(computations, computation, operand, known)
                for operand in instruction.operands
            )
            if a is None or b is None:
                return None
            return {"add": a + b, "subtract": a - b, "multiply": a * b}[instruction.opcode]
        case "fusion":
            inner = computations[instruction.attribute("calls") or ""]
            values = [
                _integer(computations, computation, operand, known)
                for operand in instruction.operands
            ]
            return _integer(
                computations,
                inner,
                inner.root,
                {inner.parameters[i]: value for i, value in enumerate(values)},
            )
    return None


def _groups(instruction: _Instruction, devices: int) -> list[list[int]]:
    """Which devices take part together, by their place in the mesh."""
    if instruction.opcode.startswith("collective-permute"):
        match = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", instruction.rest)
        return _lists(match[1]) if match else [[0, 0]]
    match = re.search(
        r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\]"
        r" \{.*?\})",
        instruction.rest,
    )
    text = match[1] if match else "{}"
    if text == "{}":
        return [list(range(devices))]
    if text.startswith("{"):
        return _lists(text[1:-1])
    if text.startswith("mesh"):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", text)}
        over = re.findall(r"'(\w+)'", text.rpartition("{")[2])
        order = [*(name for name in sizes if name not in over), *over]
        places = (
            np.arange(math.prod(sizes.values()))
            .reshape(tuple(sizes.values()))
            .transpose([list(sizes).index(n) for n in order])
        )
        return places.reshape(-1, math.prod(sizes[name] for name in over)).tolist()
    shape, dims, order = re.fullmatch(
        r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ).groups()  # type: ignore[union-attr]
    places = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return places.transpose(_numbers(order) if order else None).reshape(_numbers(shape)).tolist()


def _axes(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(mesh.values())))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(itertools.compress(mesh, differ))


def _lists(text: str) -> list[list[int]]:
    return [list(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text)]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _bytes(type_: str) -> int:
    """Of an HLO type, layouts aside."""
    total = 0
    for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", type_)):
        width = _WIDTHS.get(dtype)
        if width is None:
            bits = re.search(r"\d+", dtype)
            width = int(bits[0]) / 8 if bits else 0
        total += math.prod(_numbers(shape)) * width
    return int(total)


def _array(type_: str) -> str:
    match = _ARRAY.search(type_)
    return match[0] if match else ""


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    """The computations of a module by name, and the name of the one it starts with."""
    computations: dict[str, _Computation] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                current = computations[header[2]] = _Computation(header[2])
                entry = header[2] if header[1] else entry
        # "}}" closes attributes that hold line breaks
        elif line.startswith("}") and not line.startswith("}}"):
            current = None
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT"):
                current.root = instruction.name
            if instruction.opcode == "parameter":
                current.parameters[int(instruction.arguments)] = instruction.name
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    """`%name = type opcode(operands), attributes`"""
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    text = re.sub(r"/\*.*?\*/", "", line[match.end() :])
    end = _closing(text) if text.startswith("(") else text.index(" ")
    type_, rest = (
        (text[: end + 1], text[end + 2 :])
        if text.startswith("(")
        else (text[:end], text[end + 1 :])
    )
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest) - 1
    arguments = rest[:close]
    return _Instruction(
        match[1], type_, opcode.strip(), _NAME.findall(arguments), rest[close + 1 :], arguments
    )


def _closing(text: str) -> int:
    """Where the parenthesis that a text starts with is closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses: {text[:80]}")
