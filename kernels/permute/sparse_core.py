"""`permute` and `combine` as one Pallas kernel for SparseCores: sums of some rows of an array.

    out[n] = sum over a of x[rows[a, n]]        nothing for a row that `x` does not have

A SparseCore gathers single rows of an [R, D] array as it lies in memory, which the other cores of a
TPU cannot: a tile spans several rows. Each subcore takes as many sums as its vectors have lanes. It
gathers all their rows, some columns at a time, while it sums the columns before. Two rows in
bfloat16 share words of 32 bits, so a subcore gathers both and takes the half that is asked for. It
sums in float32 and rounds once.

Source: `ragged_gather` of tokamax has the same gathers of words.
"""

import functools
import operator
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc
from jaxtyping import Array, Float, Int

from ..route import DispatchPlan

# JAX's own pipeline passes a semaphore that its compiler does not need.
warnings.filterwarnings("ignore", "Destination semaphore is ignored")

COLUMNS = 128  # that lie together in memory
HIGH = -(2**16)  # the upper half of a word


class SparseCores(NamedTuple):
    """Those of one TPU device."""

    cores: int
    subcores: int  # of a core
    lanes: int  # of a vector of 32 bits
    memory: int  # bytes, of a subcore


class _Sums(NamedTuple):
    """What a subcore sums: `active` rows of `R` for each lane, `columns` at a time."""

    R: int
    active: int
    lanes: int
    columns: int
    halves: int  # rows that share a word
    gathers: bool  # or copies row after row, when interpreted


def of_this_tpu() -> SparseCores | None:
    """None on a TPU without any, on other platforms, and below jax 0.12, whose compiler lacks what
    the kernel needs."""
    if jax.__version_info__ < (0, 12) or not pltpu.is_tpu_device():
        return None
    info = pltpu.get_tpu_info().sparse_core
    if info is None:
        return None
    return SparseCores(info.num_cores, info.num_subcores, info.num_lanes, info.vmem_capacity_bytes)


def for_sums(
    x: Float[Array, "R D"] | jax.ShapeDtypeStruct, active: int, sums: int
) -> SparseCores | None:
    """This TPU's, if each of their lanes has a sum of `active` rows to do; None if they cannot."""
    own = of_this_tpu()
    if own is None or x.dtype not in (jnp.float32, jnp.bfloat16):
        return None
    aligned = x.shape[0] % _rows_in_a_word(x.dtype) == 0 and x.shape[1] % COLUMNS == 0
    enough = sums >= own.cores * own.subcores * own.lanes
    fits = _buffers(own, active, COLUMNS) <= own.memory
    return own if aligned and enough and fits else None


def permute(x: Float[Array, "N D"], plan: DispatchPlan, own: SparseCores) -> Float[Array, "M D"]:
    """`reference.permute`. Of the plan it reads `slots`."""
    return gather_sum(x, (plan.slots // plan.places.shape[1])[None], own)


def combine(
    outputs: Float[Array, "M D"], plan: DispatchPlan, own: SparseCores
) -> Float[Array, "N D"]:
    """`reference.combine`. Of the plan it reads `places`."""
    return gather_sum(outputs, plan.places.T, own)


def gather_sum(
    x: Float[Array, "R D"],
    rows: Int[Array, "A N"],
    own: SparseCores,
    *,
    interpret: pltpu.InterpretParams | None = None,
) -> Float[Array, "N D"]:
    """The sum of the rows `rows[:, n]` of `x` for each n, in float32, rounded once.

    Interpreted, a subcore copies the rows one after the other, from an array of words that is made
    before: the simulator of TPU memory knows neither gathers nor halves of words.
    """
    (R, D), (A, N) = x.shape, rows.shape
    workers = own.cores * own.subcores
    blocks = pl.cdiv(N, workers * own.lanes)
    padded = blocks * workers * own.lanes
    # block by block, and a row for each lane
    rows = jnp.pad(rows, ((0, 0), (0, padded - N)), constant_values=R)
    rows = rows.reshape(A, -1, own.lanes).swapaxes(0, 1).reshape(-1)
    halves = _rows_in_a_word(x.dtype)
    sums = _Sums(R, A, own.lanes, _columns(own, A, D), halves, gathers=interpret is None)
    kernel = functools.partial(_kernel, sums=sums)
    if interpret:
        anywhere = pl.BlockSpec(memory_space=pl.ANY)
        out = pl.pallas_call(
            kernel,
            grid=(workers,),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            out_shape=jax.ShapeDtypeStruct((padded // halves, D), jnp.int32),
            interpret=interpret,
        )(rows, _words(x))
        return _values(out, x.dtype)[:N]
    mesh = plsc.VectorSubcoreMesh(
        core_axis_name="core",
        subcore_axis_name="subcore",
        num_cores=own.cores,
        num_subcores=own.subcores,
    )
    run: Any = pl.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((padded, D), x.dtype),
        mesh=mesh,
        compiler_params=pltpu.CompilerParams(
            use_tc_tiling_on_sc=True, needs_layout_passes=True, disable_bounds_checks=True
        ),
        name="gather_sum",
    )
    return run(rows, x)[:N]


def _kernel(rows_hbm, x_hbm, out_hbm, *, sums: _Sums):
    """A subcore's blocks of sums, one after the other; of each, some columns at a time."""
    lanes, columns = sums.lanes, sums.columns
    if sums.gathers:
        axes = "core", "subcore"
        worker, workers = jax.lax.axis_index(axes), jax.lax.axis_size(axes)
        x, out = (ref.bitcast(jnp.int32) for ref in (x_hbm, out_hbm))
    else:
        worker, workers, x, out = pl.program_id(0), pl.num_programs(0), x_hbm, out_hbm

    def block(rows_ref):
        number = pl.program_id(0) * workers + worker
        slots = [pl.ds(a * lanes, lanes) for a in range(sums.active)]

        def words(slot):
            return jnp.minimum(rows_ref[slot], sums.R - 1) // sums.halves

        if sums.gathers:
            specs = [
                pl.BlockSpec((pl.Indirect(lanes), columns), lambda c, slot=slot: (words(slot), c))
                for slot in slots
            ]
        else:
            specs = [
                pl.BlockSpec((1, columns), lambda c, slot=slot, i=i: (words(slot)[i], c))
                for slot in slots
                for i in range(lanes)
            ]
        pltpu.emit_pipeline(
            functools.partial(_part, sums, [rows_ref[slot] for slot in slots]),
            grid=(x.shape[1] // columns,),
            in_specs=specs,
            out_specs=pl.BlockSpec((lanes // sums.halves, columns), lambda c: (number, c)),
        )(*[x] * len(specs), out)

    pltpu.emit_pipeline(
        block,
        grid=(rows_hbm.size // (sums.active * lanes * workers),),
        in_specs=pl.BlockSpec((sums.active * lanes,), lambda b: (b * workers + worker,)),
    )(rows_hbm)


def _part(sums: _Sums, rows, *refs):
    """`refs`: the words gathered for each slot of each lane, and those of the sums."""
    *gathered, sums_ref = refs
    # what a word is shifted by, and what is kept of it: nothing of a row that `x` does not have
    shifts = [16 * (1 - row % 2) for row in rows]
    kept = [jnp.where(row < sums.R, HIGH if sums.halves == 2 else -1, 0) for row in rows]

    @(plsc.parallel_loop if sums.gathers else pl.loop)(0, sums.columns, step=COLUMNS)
    def _(first):
        here = pl.ds(first, COLUMNS)

        def value(a, lane):
            ref, row = (gathered[a], lane) if sums.gathers else (gathered[a * sums.lanes + lane], 0)
            word = ref[pl.ds(row, 1), here]
            if sums.halves == 2:
                word = jnp.left_shift(word, shifts[a][lane])
            return _bits(word & kept[a][lane], jnp.float32)

        def total(lane):
            values = (value(a, lane) for a in range(sums.active))
            bits = _bits(functools.reduce(operator.add, values), jnp.int32)
            return _rounded(bits) if sums.halves == 2 and sums.active > 1 else bits

        for i in range(sums.lanes // sums.halves):
            if sums.halves == 1:
                word = total(i)
            else:
                low, high = total(2 * i), total(2 * i + 1)
                word = jax.lax.shift_right_logical(low, 16) | (high & HIGH)
            sums_ref[pl.ds(i, 1), here] = word


def _bits(x: Array, dtype) -> Array:
    return jax.lax.bitcast_convert_type(x, dtype)


def _rounded(bits):
    """Those of a float32, so that their upper half is the nearest bfloat16, the even one of two."""
    return bits + 0x7FFF + (jax.lax.shift_right_logical(bits, 16) & 1)


def _rows_in_a_word(dtype) -> int:
    return 4 // dtype.itemsize


def _buffers(own: SparseCores, active: int, columns: int) -> int:
    """Bytes of a subcore's: two for the rows of each slot and for the sums."""
    return 2 * (active + 1) * own.lanes * columns * 4


def _columns(own: SparseCores, active: int, D: int) -> int:
    """The widest part of D columns whose buffers leave a fifth of the memory."""
    widths = range(D, 0, -COLUMNS)
    return next(
        width
        for width in widths
        if width == COLUMNS
        or (D % width == 0 and 5 * _buffers(own, active, width) <= 4 * own.memory)
    )


def _words(x: Float[Array, "R D"]) -> Int[Array, "words D"]:
    """`x` as it lies in TPU memory, two rows of 16 bits in a word."""
    halves = _rows_in_a_word(x.dtype)
    pairs = x.reshape(-1, halves, x.shape[1]).swapaxes(1, 2)
    return _bits(pairs if halves > 1 else x, jnp.int32)


def _values(words: Int[Array, "words D"], dtype) -> Float[Array, "R D"]:
    """The inverse of `_words`."""
    values = _bits(words, dtype)
    return values if values.ndim == 2 else values.swapaxes(1, 2).reshape(-1, words.shape[1])
