"""`flexolmo plan`: compiles a step for a TPU slice on a machine without one, and reports its cost.

The compiler is libtpu's own. It places every collective and every buffer, and refuses what does not
fit. Nothing is run.
"""

import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from flexolmo_jax.config import (
    MeshConfig,
    ModelConfig,
    RunConfig,
    check_microbatch,
    expect,
    to_dict,
)
from flexolmo_jax.errors import UserError, from_a_clone
from flexolmo_jax.integrity import MATRICES
from flexolmo_jax.kernels import Kernels
from flexolmo_jax.runtime import sharding
from flexolmo_jax.runtime.progress import note
from flexolmo_jax.runtime.tpus import Slice, slices_of
from flexolmo_jax.train.activations import kept_bytes
from flexolmo_jax.train.flops import forward_flops, step_flops
from flexolmo_jax.train.step import check_remat

from .collectives import collectives
from .program import named, program_of
from .roofline import ASSUMPTIONS, by_kind_and_axis, roofline
from .steps import (
    Decoded,
    Generation,
    Step,
    architecture,
    fsdp_minimum,
    generation,
    training_step,
)

GIB = 2**30


def plan_training(
    run: RunConfig, slice_: Slice, slices: int = 1, is_trained: Callable[[str], bool] | None = None
) -> dict[str, Any]:
    """The report of a run's training step.

    `is_trained`: by path, where it is not the run's own. Raises UserError for a mesh or a batch
    that does not fit the slice's devices.
    """
    check_remat(run.train.remat, "tpu")
    model, program = architecture(run), program_of(run)
    run = run.of_model(model, "what it starts from")
    mesh = mesh_of(run.mesh, slice_, slices, run)
    flops = step_flops(run, model)
    tokens = run.data.batch_size * run.data.seq_len
    step = training_step(run, model, mesh, is_trained)
    how = f"train.remat={run.train.remat}, train.accumulate={run.train.accumulate}"
    _announce(f"a training step ({how})", slice_, slices)
    compiled = _compiled(step, mesh)
    offloaded = run.train.accumulate * kept_bytes(run, model).on_host // mesh.size
    report = _report(compiled, step, slice_, mesh, flops.hardware, tokens, offloaded)
    if report["fits"]:
        of_microbatch = fsdp_minimum(step, run.train.compute_dtype)
        more = {"fsdp_minimum_bytes": run.train.accumulate * of_microbatch}
    else:
        more = {"change": _training_advice(run, slice_, slices, mesh, report)}
    what = {"program": program, "model_flops": flops.model}
    # Nothing else lies on a device between a restore and the first step.
    what["restore_bytes"] = size_of(step.arguments[:2])
    return _head(slice_, slices, mesh) | what | report | more


def plan_decoding(
    what: Decoded, slice_: Slice, batch: int, context: int, kernels: Kernels = "auto"
) -> dict[str, Any]:
    """The report of one decoding step in bfloat16: a token for each of `batch` prompts.

    The cache has `context` slots. `prefill` is the report of reading prompts of half as many
    tokens, and `prefill_bytes` its peak. Raises UserError for a context that the model does not
    have, and prompts or a mesh that do not fit the slice's devices.
    """
    model, vocab_size, mesh = what
    in_range = 2 <= context <= model.max_seq_len
    most = f"2 to {model.max_seq_len} (model.max_seq_len)"
    expect(in_range, "the context of --decode", context, f"{most}: a prompt and new tokens")
    where = mesh_of(mesh, slice_, 1)
    flops = batch * sum(forward_flops(model, model.n_active, context))
    generating = generation(what, where, batch, context, kernels)
    step = generating.step()
    _announce(f"what reads {batch} prompts and completes them", slice_)
    loop = _compiled(step, where)
    unread = unread_bytes(step.kinds["frozen"], model, batch)
    report = _report(loop, step, slice_, where, flops, batch, unread=unread)
    if report["fits"]:
        prefill = _prefill(generating, loop, slice_, where)
        peak = max(prefill["peak_bytes"], report["peak_bytes"])
        report |= {"prefill": prefill, "prefill_bytes": prefill["peak_bytes"], "peak_bytes": peak}
        report["fits"] = peak <= report["hbm_bytes"]
    advice = {}
    if not report["fits"]:
        smaller = "fewer prompts or a shorter context (--decode PROMPTSxCONTEXT), or "
        advice = {"change": _larger(slice_, report, smaller)}
    decode = {"batch": batch, "context": context}
    if vocab_size < model.vocab_size:
        decode["vocab_size"] = vocab_size
    program = {"model": to_dict(model), "mesh": to_dict(mesh), "decode": decode}
    program |= named(kernels)
    return _head(slice_, 1, where) | {"program": program, "model_flops": flops} | report | advice


def unread_bytes(params: Any, model: ModelConfig, batch: int) -> int:
    """Bytes on each device of experts that none of `batch` tokens chooses, if every expert is
    chosen as often as the others."""
    experts = sum(size_of(params["experts"][name]) for name in MATRICES)
    return int(experts * (1 - model.n_active / model.n_experts) ** batch)


def _prefill(generating: Generation, loop: Any, slice_: Slice, mesh: Mesh) -> dict[str, Any]:
    """The report of reading the prompts: the model's forward pass without logits."""
    step, model = generating.prefill(loop), generating.decoding.config
    batch, prompt, _ = generating.sizes
    attention, experts, _ = forward_flops(model, model.n_active, prompt / 2)
    tokens = batch * prompt
    flops = tokens * (attention + experts)
    return _report(_compiled(step, mesh), step, slice_, mesh, flops, tokens)


def compile_step(step: Step, mesh: Mesh) -> Any:
    """The compiled program.

    Raises jax.errors.JaxRuntimeError (RESOURCE_EXHAUSTED) if it does not fit.
    """
    # Kernels ask which TPU they are traced for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.function.lower(*step.arguments).compile()


def size_of(tree: Any) -> int:
    """Bytes on each device."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def mesh_of(config: MeshConfig, slice_: Slice, slices: int, run: RunConfig | None = None) -> Mesh:
    """The mesh over all devices of the slices, checked before a compiler is needed for them.

    Raises UserError where it does not fill them, or the run's batch does not divide over it.
    """
    devices = slice_.devices * slices
    sizes = config.sizes(devices, slices)
    if math.prod(sizes.values()) != devices:
        shown = " x ".join(f"{axis} {n}" for axis, n in sizes.items())
        raise UserError(
            f"mesh {shown} does not fill the {devices} devices of {slices} x {slice_.name}; set one"
            " axis to -1"
        )
    if run is not None:
        check_microbatch(run, sizes)
    return sharding.make_mesh(config, _devices(slice_, slices))


def _devices(slice_: Slice, slices: int) -> list[Any]:
    """Devices that can be compiled for. Raises UserError where there is no compiler for them."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "flexolmo plan needs libtpu, the TPU's compiler, in an environment of its own:"
            f" {from_a_clone('tpu', '.venv-tpu')} && .venv-tpu/bin/flexolmo plan ..."
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if slice_.chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return list(
        topologies.get_topology_desc(platform="tpu", topology_name=slice_.name, **options).devices
    )


def _head(slice_: Slice, slices: int, mesh: Mesh) -> dict[str, Any]:
    return {
        "topology": slice_.name,
        "slices": slices,
        "chips": slice_.chips * slices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "jax": jax.__version__,
    }


def _announce(what: str, slice_: Slice, slices: int = 1) -> None:
    where = f"{slices} x {slice_.name}" if slices > 1 else slice_.name
    note(f"compiling {what} for {where}; this may take minutes")


def _compiled(step: Step, mesh: Mesh) -> Any:
    """The compiled step, or the bytes that a device would need if it does not fit."""
    try:
        return compile_step(step, mesh)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _needed(str(error))


def _peak(compiled: Any) -> int:
    """The most bytes in use at once on a device.

    The compiler compares this with a device's memory. It is not the sum of arguments and
    temporaries, as some temporaries reuse the arguments' memory.
    """
    if isinstance(compiled, int):
        return compiled
    memory = compiled.memory_analysis()
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def _report(  # noqa: PLR0913 - a program and what is known of it
    compiled: Any,
    step: Step,
    slice_: Slice,
    mesh: Mesh,
    flops: float,
    tokens: int,
    offloaded: int = 0,
    unread: int = 0,
) -> dict[str, Any]:
    limit, peak = int(slice_.chip.usable_gib * GIB), _peak(compiled)
    sizes = {f"{name}_bytes": size_of(tree) for name, tree in step.kinds.items()}
    report = {"fits": peak <= limit, "hbm_bytes": limit, "peak_bytes": peak, **sizes}
    if isinstance(compiled, int):
        rest = max(peak - sum(sizes.values()), 0)  # the step's number too
        return report | {"fits": False, "temporary_bytes": rest, "flops": flops}
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    moved = collectives(compiled.as_text(), dict(mesh.shape), one_pass="cache" in step.kinds)
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - unread
    times = roofline(slice_, mesh, flops, used, moved, offloaded)
    return report | {
        "temporary_bytes": peak - memory.argument_size_in_bytes - results,
        "result_bytes": results,
        "flops": flops,
        "collectives": by_kind_and_axis(moved),
        "collective_bytes": math.ceil(sum(one.total for one in moved)),
        "blocking_bytes": math.ceil(sum(one.total for one in moved if not one.overlapped)),
        "seconds": times,
        "tokens_per_second": [tokens / times["in_turn"], tokens / times["overlapped"]],
        "assumptions": ASSUMPTIONS,
    }


def _needed(message: str) -> int:
    """Bytes that a device would need, arguments included, by the compiler's refusal.

    The refusal calls them "HLO temporaries", but they are all bytes: a decoding step that takes
    28.6 GiB in all on a v6e is refused with 32.5 and 36.5 G when its cache is 2 and 4 GiB longer.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    found = re.search(r"(?:Used|memory required[^(]*\() *([0-9.]+)([KMGT]?)", message)
    if found is None:
        raise ValueError(f"a refusal without sizes: {message[:300]}")
    return int(float(found[1]) * units[found[2]])


def _training_advice(
    run: RunConfig, slice_: Slice, slices: int, mesh: Mesh, report: dict[str, Any]
) -> str:
    devices = sharding.devices_of_batch(mesh)
    records = run.data.batch_size // run.train.accumulate // devices
    state = sum(report[f"{kind}_bytes"] for kind in ("parameters", "frozen", "optimizer"))
    if state > report["hbm_bytes"]:
        return more_memory(slice_, slices, report)
    if records > 1:
        return (
            f"--set train.accumulate={run.data.batch_size // devices} (a device holds {records}"
            " records at once; then it holds 1)"
        )
    if run.train.remat != "full":
        return "--set train.remat=full"
    return more_memory(slice_, slices, report)


def more_memory(slice_: Slice, slices: int, report: dict[str, Any]) -> str:
    """What to change where no setting of a training step makes it fit."""
    return _larger(slice_, report, "" if slices > 1 else "more slices or ")


def _larger(slice_: Slice, report: dict[str, Any], other: str) -> str:
    need = report["peak_bytes"] * slice_.chips
    larger = [
        s
        for s in slices_of(slice_.chip.name)
        if s.chips > slice_.chips and need / s.chips < slice_.chip.usable_gib * GIB
    ]
    if larger:
        return f"{other}a larger slice, such as {larger[0].name}"
    return f"{other}another type of TPU with more memory"


def show(report: dict[str, Any]) -> str:
    """For people."""
    work = f"{report['flops']:.3g} FLOPs a step, {report['model_flops']:.3g} of them the model's"
    lines = [*_fit(report), *_memory(report), f"work: {work}"]
    if "collectives" in report:
        lines += [*_moved(report), *_times(report, "a step")]
        if "collectives" in report.get("prefill", {}):
            prefill = report["prefill"]
            lines += ["reading prompts:", *_moved(prefill), *_times(prefill, "all prompts")]
        lines.append(f"assumed: {report['assumptions']}")
    return "\n".join(lines)


def _gib(number: float) -> str:
    return f"{number / GIB:.2f} GiB"


def _fit(report: dict[str, Any]) -> list[str]:
    mesh = " x ".join(f"{axis} {n}" for axis, n in report["mesh"].items() if n > 1) or "one device"
    slices = f"{report['slices']} x " if report["slices"] > 1 else ""
    chips = f"{report['chips']} chips, {report['devices']} devices"
    used, limit = report["peak_bytes"], report["hbm_bytes"]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines = [
        f"{slices}{report['topology']}: {chips}, {mesh}",
        f"{verdict}: {_gib(used)} of {_gib(limit)} a device ({used / limit:.0%})",
    ]
    if "change" in report:
        lines.append(f"to change: {report['change']}")
    return lines


def _memory(report: dict[str, Any]) -> list[str]:
    names = {
        "parameters_bytes": "trained parameters",
        "frozen_bytes": "frozen parameters",
        "optimizer_bytes": "optimiser state",
        "cache_bytes": "KV cache",
        "batch_bytes": "batch",
        "temporary_bytes": "temporaries",
        "result_bytes": "results",
    }
    sizes = {name: report.get(key, 0) for key, name in names.items()}
    lines = [f"  {name:<20}{_gib(size):>12}" for name, size in sizes.items() if size >= 2**20]
    if "prefill_bytes" in report:
        lines.append(f"  while prompts are read: {_gib(report['prefill_bytes'])}")
    if "restore_bytes" in report:
        lines.append(f"  a run that resumes starts with {_gib(report['restore_bytes'])}")
    return ["memory, a device:", *lines]


def _moved(report: dict[str, Any]) -> list[str]:
    total = f"collectives, received by a device: {_gib(report['collective_bytes'])}"
    total += f", {_gib(report['blocking_bytes'])} of them while no product runs"
    if "fsdp_minimum_bytes" in report:
        total += f"; weights and gradients alone take {_gib(report['fsdp_minimum_bytes'])}"
    forms = {"": "", "ring": " (in rings)", "all-reduce": " (written as an all-reduce)"}
    lines = [
        f"  {entry['kind'] + forms[entry['form']]:<40}{entry['axes']:<16}{_gib(entry['bytes']):>12}"
        + (", overlapped" if entry["overlapped"] else "")
        for entry in report["collectives"]
        if entry["bytes"] >= 2**20
    ]
    return [total, *lines]


def _times(report: dict[str, Any], what: str) -> list[str]:
    times, (low, high) = report["seconds"], report["tokens_per_second"]
    return [
        f"{what}: at least {times['overlapped']:.3g} s ({times['bound']}), about"
        f" {times['in_turn']:.3g} s where nothing overlaps: {low:,.0f} to {high:,.0f} tokens/s",
        f"  products {times['compute']:.3g} s, HBM {times['memory']:.3g} s, links"
        f" {times['network']:.3g} s"
        + (f", the host's memory {times['host']:.3g} s" if times["host"] else ""),
    ]
