"""What a compiled program moves between devices, read from its HLO text.

Every collective is counted as often as the loops around it run. The compiler overlaps many gathers
and reductions with the products that they feed. Then they are written in other forms, but counted
as what they are:

- a ring of `collective-permute` in a loop of its own, counted move by move;
- one gather whose parts are spread over another loop, a chain of one channel;
- a gather over a whole torus: an all-reduce of arrays that are 0 but for each device's own part;
- a reduce-scatter: an all-reduce of which each device cuts out its part.

Between slices the runtime does the exchange: the program only sends to it and receives.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .hlo import COPIES, Computation, Instruction, Program, bytes_of, first_array, numbers, parse

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
    "collective-broadcast",
)
PRODUCTS = ("dot", "convolution", "ragged-dot", "custom-call")
_RING = re.compile(r"windowed_dot_general_body_(ag|rs)")
_RINGS = {"ag": "all-gather", "rs": "reduce-scatter"}
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target="\{([\d,:]+)\}x[^"]*",_xla_megascale_transfer_type="(\w+)"'
)
_GROUPS = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\{\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\] \{.*?\})"
)


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes that it runs over
    size: int  # devices that take part together
    # that each device receives in one run; an all-reduce counts as a reduce-scatter and a gather
    bytes: float
    runs: int  # times a step
    # "" as it is written; "ring": a move of a ring that overlaps with a product; "all-reduce":
    # written as an all-reduce
    form: str
    overlapped: bool  # whether a matrix product runs between its start and its end
    traced: str  # what it comes from: the operation's name in the traced program
    operand: str  # the first operand's HLO type, as f32[4096,256]

    @property
    def total(self) -> float:
        """Bytes that each device receives in a step."""
        return self.bytes * self.runs


def collectives(hlo: str, mesh: Mapping[str, int], *, one_pass: bool = False) -> list[Collective]:
    """All collectives of a partitioned program, a start and its done as one.

    mesh: axis sizes in the order of its devices. one_pass: count one pass of the program's own
    loop, whose length its arguments decide. Raises ValueError for any other loop around a
    collective whose length the text does not tell.
    """
    program = parse(hlo)
    found: dict[tuple[str, int], Collective] = {}
    for instruction, computation, runs in program.walk(_is_collective, one_pass=one_pass):
        chained = "chain_id=" in instruction.attributes and instruction.attribute("channel_id")
        name = chained or f"{computation.name}/{instruction.name}"
        for i, one in enumerate(_each_operand(program, computation, instruction, runs, mesh)):
            # the parts of a chain run more often than it starts
            if (name, i) not in found or runs < found[name, i].runs:
                found[name, i] = one
    return _with_whole_rings(found.values())


def _each_operand(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    runs: int,
    mesh: Mapping[str, int],
) -> list[Collective]:
    """What an instruction moves of each of its operands; nothing where it is no collective."""
    kind = _kind(instruction)
    if kind is None:
        return []
    size, axes = _taking_part(instruction, mesh)
    if size == 1:
        return []
    is_single = kind == "collective-permute" or _BETWEEN_SLICES.search(instruction.attributes)
    op = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    traced = op[1].replace("\\'", "'") if op else ""
    overlapped = _overlaps(program, computation, instruction)
    found = []
    for i, operand in enumerate(instruction.operands[: 1 if is_single else None]):
        meaning, form = _meaning(program, computation, instruction, i)
        type_ = computation.instructions[operand].type
        received = _received(kind, bytes_of(type_), size) / (2 if form == "all-reduce" else 1)
        found.append(
            Collective(
                meaning, axes, size, received, runs, form, overlapped, traced, first_array(type_)
            )
        )
    return found


def _with_whole_rings(found: Iterable[Collective]) -> list[Collective]:
    """The first and last moves of a ring stand outside of its loop: they are moves of it too."""
    found = list(found)
    rings: dict[str, set[str]] = {}
    for one in found:
        if one.form == "ring":
            rings.setdefault(one.traced, set()).add(one.kind)
    kinds = {traced: kinds.pop() for traced, kinds in rings.items() if len(kinds) == 1}
    return [
        dataclasses.replace(one, kind=kinds[one.traced], form="ring")
        if one.kind == "collective-permute" and one.traced in kinds
        else one
        for one in found
    ]


def _is_collective(instruction: Instruction) -> bool:
    return _kind(instruction) is not None


def _kind(instruction: Instruction) -> str | None:
    """One of KINDS, where an instruction starts a collective."""
    if between := instruction.opcode == "send" and _BETWEEN_SLICES.search(instruction.attributes):
        kind = between[2].lower().replace("_", "-")
        return kind if kind in KINDS else "collective-permute"
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _overlaps(program: Program, computation: Computation, instruction: Instruction) -> bool:
    """Whether the schedule has a matrix product while a collective is under way.

    The text of a compiled program is in the order of its schedule.
    """
    if "chain_id=" in instruction.attributes:  # its parts are spread over a loop with products
        return True
    computation, instruction = program.starts.get(computation.name, (computation, instruction))
    if not instruction.opcode.endswith(("-start", "send")):
        return False
    names = {instruction.name}
    after = itertools.dropwhile(lambda i: i is not instruction, computation.instructions.values())
    for later in itertools.islice(after, 1, None):
        if names & set(later.operands):
            if later.opcode.endswith("-done"):
                return False
            names.add(later.name)
        elif _multiplies(program, later):
            return True
    return False


def _multiplies(program: Program, instruction: Instruction) -> bool:
    is_product = instruction.opcode in PRODUCTS
    inner = (program.computations[name] for name in instruction.calls())
    return is_product or any(
        _multiplies(program, each) for one in inner for each in one.instructions.values()
    )


def _taking_part(instruction: Instruction, mesh: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """How many devices take part together, and along which axes of the mesh they differ."""
    if between := _BETWEEN_SLICES.search(instruction.attributes):
        return _count(between[1]), (next(iter(mesh)),)  # slices lie along the first axis
    groups = _groups(instruction, math.prod(mesh.values()))
    differ = np.zeros(len(mesh), bool)
    for group in groups:
        places = np.array(np.unravel_index(group, tuple(mesh.values())))
        differ |= (places != places[:, :1]).any(axis=1)
    return len(groups[0]), tuple(itertools.compress(mesh, differ))


def _count(text: str) -> int:
    """How many numbers a list of numbers and ranges holds: 0,2:4 are four."""
    ranges = (part.partition(":") for part in text.split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in ranges)


def _groups(instruction: Instruction, devices: int) -> list[list[int]]:
    """Which devices take part together, by their place in the mesh."""
    if instruction.opcode.startswith("collective-permute"):
        match = re.search(r"source_target_pairs=\{(\{[^=]*?\})\}", instruction.attributes)
        return _lists(match[1]) if match else [[0, 0]]
    match = _GROUPS.search(instruction.attributes)
    text = match[1] if match else "{}"
    if text == "{}":
        return [list(range(devices))]
    if text.startswith("{"):
        return _lists(text[1:-1])
    return _groups_of_axes(text) if text.startswith("mesh") else _groups_of_shape(text)


def _lists(text: str) -> list[list[int]]:
    return [list(numbers(group)) for group in re.findall(r"\{([\d,]+)\}", text)]


def _groups_of_axes(text: str) -> list[list[int]]:
    """Groups along axes of a mesh, or along parts of them: `mesh['a'=2, 'b'=8] {'a', 'b':(2)4}`.
    Such a part is the axis as (2, 4, ...), without the first 2 and what follows the 4."""
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", text)}
    found = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", text.rpartition("{")[2])
    over = [(name, int(before or 1), int(n or sizes[name])) for name, before, n in found]
    dims = []  # the axes, each cut where a part of it begins or ends
    for axis, size in sizes.items():
        parts = [(before, n) for name, before, n in over if name == axis]
        cuts = sorted({1, size}.union(*({before, before * n} for before, n in parts)))
        dims += [(axis, at, end // at) for at, end in itertools.pairwise(cuts)] or [(axis, 1, 1)]
    order = [*(dim for dim in dims if dim not in over), *over]
    places = np.arange(math.prod(sizes.values())).reshape([n for *_, n in dims])
    places = places.transpose([dims.index(dim) for dim in order])
    return places.reshape(-1, math.prod(n for *_, n in over)).tolist()


def _groups_of_shape(text: str) -> list[list[int]]:
    """Groups as lines of all devices, reshaped and transposed: `[2,4]<=[4,2]T(1,0)`."""
    match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    assert match is not None
    shape, dims, order = match.groups()
    places = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return places.transpose(numbers(order) if order else None).reshape(numbers(shape)).tolist()


def _meaning(
    program: Program, computation: Computation, instruction: Instruction, operand: int
) -> tuple[str, str]:
    """(kind, form) of what a collective does to one of its operands."""
    kind = _kind(instruction) or ""
    if kind == "collective-permute":
        ring = _RING.search(computation.name)
        return (_RINGS[ring[1]], "ring") if ring else (kind, "")
    if kind != "all-reduce" or instruction.opcode == "send":
        return kind, ""
    if _origin(program, computation, instruction.operands[operand]) == "dynamic-update-slice":
        return "all-gather", "all-reduce"
    users = _users(computation, instruction, operand)
    if users and all(_cuts(program, user, name) for user, name in users):
        return "reduce-scatter", "all-reduce"
    return kind, ""


def _origin(program: Program, computation: Computation, name: str) -> str:
    """The operation that makes an array, behind copies and inside fusions."""
    instruction = computation.resolve(name)
    if instruction.opcode == "fusion":
        inner = program.called(instruction)
        return _origin(program, inner, inner.root)
    return instruction.opcode


def _users(
    computation: Computation, instruction: Instruction, output: int
) -> list[tuple[Instruction, str]]:
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
            if other.opcode in COPIES:
                names.add(other.name)
            elif other.opcode != "get-tuple-element":
                found.append((other, name))
    return found


def _cuts(program: Program, user: Instruction, name: str) -> bool:
    """Whether a reader of an array reads a slice of it that depends on the device."""
    if user.opcode == "fusion":
        inner = program.called(user)
        parameter = inner.parameters[user.operands.index(name)]
        readers = _users(inner, inner.instructions[parameter], 0)
        return bool(readers) and all(_cuts(program, reader, read) for reader, read in readers)
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
