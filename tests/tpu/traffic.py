"""Bytes that a compiled TPU program moves in and out of HBM, counted from its text.

An instruction reads its operands and writes its result, padded to tiles as they lie in memory,
where these are in HBM and not in VMEM (memory space 1). A Pallas kernel reads its operands once. A
gather, XLA's or `gather_sum`, reads a word of 32 bits for each value: two rows of 16 bits lie in
the same words, and whoever reads one reads both. Loops are not multiplied: this is for programs
without any.
"""

import math
import re

from flexolmo_jax.plan.hlo import Instruction, Program, numbers, parse

FREE = ("parameter", "bitcast", "tuple", "get-tuple-element", "constant", "optimization-barrier")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([0-9,]*)\](\{[^}]*\})?")


def hbm_bytes(hlo: str) -> int:
    program = parse(hlo)
    instructions = program.computations[program.entry].instructions
    return sum(_of(program, each, instructions) for each in instructions.values())


def _of(program: Program, one: Instruction, by_name: dict[str, Instruction]) -> int:
    is_kernel = "tpu_custom_call" in one.attributes
    is_begun = re.search("-(start|update)$", one.opcode)  # counted where it is done
    if one.opcode in FREE or is_begun or (one.opcode == "custom-call" and not is_kernel):
        return 0
    if one.opcode == "call-done":  # a SparseCore has gathered, or laid out anew
        sources = [each.type for each in _sources(one, by_name)]
        rows = next((type_ for type_ in sources if type_.startswith("s32[")), None)
        if rows is None:
            return int(
                sum(_size(type_) * _is_in_hbm(type_) for type_ in sources) + _written(one.type)
            )
        values = _values(one.type) // _shape(one.type)[0] * _values(rows)
        return int(_size(rows) + 4 * values + _written(one.type))
    if one.opcode.endswith("-done"):
        [source, *_] = _sources(one, by_name)
        return int(_size(one.type) * (_is_in_hbm(one.type) + _is_in_hbm(source.type)))
    read = [by_name[name].type for name in one.operands]
    sizes = [_size(type_) * _is_in_hbm(type_) for type_ in read]
    if _gathers(program, one):
        sizes = [min(size, 4 * _values(one.type)) for size in sizes]
    return int(sum(sizes) + _written(one.type))


def _sources(done: Instruction, by_name: dict[str, Instruction]) -> list[Instruction]:
    """What an asynchronous copy, slice or gather reads."""
    began = by_name[done.operands[0]]
    data = [by_name[name] for name in began.operands]
    return [each for each in data if not each.opcode.endswith("-start")]


def _gathers(program: Program, one: Instruction) -> bool:
    called = program.computations.get(one.attribute("calls") or "")
    inside = called.instructions.values() if called else [one]
    return any(each.opcode == "gather" for each in inside)


def _written(type_: str) -> float:
    """Of all arrays of a type that are in HBM."""
    arrays = (match[0] for match in _ARRAY.finditer(type_))
    return sum(_size(array) * _is_in_hbm(array) for array in arrays)


def _shape(type_: str) -> list[int]:
    """Of the first array of a type."""
    match = _ARRAY.search(type_)
    return list(numbers(match[3])) if match else []


def _values(type_: str) -> int:
    return math.prod(_shape(type_))


def _size(type_: str) -> float:
    """Of the first array of a type, with its padding."""
    match = _ARRAY.search(type_)
    if match is None:
        return 0
    shape, layout = list(numbers(match[3])), match[4] or ""
    order = re.match(r"\{([0-9,]*)", layout)
    if order and order[1]:
        shape = [shape[axis] for axis in numbers(order[1])]  # the fastest first
    tile = re.search(r"T\(([0-9,]+)\)", layout)
    for i, size in enumerate(reversed(numbers(tile[1])) if tile else ()):
        if i < len(shape):
            shape[i] = -(-shape[i] // size) * size
    return math.prod(shape) * int(match[2] or 8) / 8


def _is_in_hbm(type_: str) -> bool:
    return not re.search(r"S\([1-9]\)", type_)
