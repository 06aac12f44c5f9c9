"""The name of every tensor in Hugging Face's checkpoints, both ways.

`key_table` is the whole correspondence: one entry for each tensor of a Hugging Face checkpoint, in
that checkpoint's order, with its place in our parameters. Ours stack layers and experts and store
matrices as [in, out]; Hugging Face has one matrix a layer and expert, as [out, in]. `to_hf` and
`from_hf` apply the table in memory, importing.py and exporting.py to files, tensor by tensor.

What `config.json` says is in hub_config.py. A dense model has no router: a softmax over one expert
is 1. Names are those of transformers 5.23.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import UserError
from flexolmo_jax.model import Params, init_params

from .families import FAMILIES, MATRICES, family_of

# of attention and FFN, where they are norms of what comes out and of what goes in
NORMS = {
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "pre": ("input_layernorm", "post_attention_layernorm"),
}
TILE = 256  # side of the squares that `transposed` copies
TOGETHER = "check that config.json and the weights belong together"


class Entry(NamedTuple):
    """One tensor of a Hugging Face checkpoint: element `index` of our leaf at `path`."""

    name: str
    shape: tuple[int, ...]  # in the Hugging Face checkpoint
    path: tuple[str, ...]  # of our leaf
    index: tuple[int, ...] = ()  # into our leaf: (), (layer,) or (layer, expert)
    transpose: bool = False  # a linear map: ours is [in, out], Hugging Face's [out, in]


def key_table(config: ModelConfig, model_type: str | None = None) -> list[Entry]:
    """Every tensor of this model's Hugging Face checkpoint, in that checkpoint's order.

    Raises UserError for a dense family with several experts.
    """
    model_type = model_type or family_of(config)
    experts = FAMILIES[model_type].experts
    if experts is None and config.n_experts > 1:
        raise UserError(
            f"{model_type} is a dense model; got {config.n_experts} experts; write it as a mixture"
        )
    V, D, E = config.vocab_size, config.d_model, config.n_experts
    table = [Entry("model.embed_tokens.weight", (V, D), ("trunk", "embedding"))]
    for l in range(config.n_layers):
        table += _trunk_entries(config, l)
        if experts is not None:
            name = f"model.layers.{l}.{experts}.gate.weight"
            table.append(Entry(name, (E, D), ("experts", "row"), (l,)))
        table += _ffn_entries(config, experts, l)
    table.append(Entry("model.norm.weight", (D,), ("trunk", "norm", "scale")))
    if not config.tied_head:
        table.append(Entry("lm_head.weight", (V, D), ("trunk", "head", "kernel"), transpose=True))
    return table


def _trunk_entries(config: ModelConfig, l: int) -> list[Entry]:
    """Attention and the norms of layer `l`."""
    hf, ours, D, C = f"model.layers.{l}", ("trunk", "layers"), config.d_model, config.head_size
    sizes = {"q": config.n_heads * C, "k": config.n_kv_heads * C, "v": config.n_kv_heads * C}
    entries = []
    for name, size in sizes.items():
        path = (*ours, "attention", name)
        weight = f"{hf}.self_attn.{name}_proj"
        entries.append(Entry(f"{weight}.weight", (size, D), (*path, "kernel"), (l,), True))
        if config.attention_bias:
            entries.append(Entry(f"{weight}.bias", (size,), (*path, "bias"), (l,)))
    path = (*ours, "attention", "o", "kernel")
    entries.append(Entry(f"{hf}.self_attn.o_proj.weight", (D, sizes["q"]), path, (l,), True))
    of_attention, of_ffn = NORMS[config.norm]
    norms: dict[str, tuple[int, tuple[str, ...]]] = {
        of_attention: (D, ("attention_norm",)),
        of_ffn: (D, ("ffn_norm",)),
    }
    if config.qk_norm != "none":
        for name in ("q", "k"):
            size = C if config.qk_norm == "head" else sizes[name]
            norms[f"self_attn.{name}_norm"] = (size, ("attention", f"{name}_norm"))
    for name, (size, path) in norms.items():
        entries.append(Entry(f"{hf}.{name}.weight", (size,), (*ours, *path, "scale"), (l,)))
    return entries


def _ffn_entries(config: ModelConfig, experts: str | None, l: int) -> list[Entry]:
    """The FFN of every expert of layer `l`."""
    D, F = config.d_model, config.d_ffn
    names = MATRICES.get(experts or "", {name: f"{name}_proj" for name in ("gate", "up", "down")})
    entries = []
    for e in range(config.n_experts):
        place = "mlp" if experts is None else f"{experts}.experts.{e}"
        for name, shape in {"gate": (F, D), "up": (F, D), "down": (D, F)}.items():
            key = f"model.layers.{l}.{place}.{names[name]}.weight"
            entries.append(Entry(key, shape, ("experts", name), (l, e), True))
    return entries


def to_hf(
    config: ModelConfig,
    params: Params,
    model_type: str | None = None,
    *,
    drop_bias: bool = False,
) -> dict[str, np.ndarray]:
    """The tensors of the Hugging Face checkpoint by name, contiguous, in the parameters' dtypes.

    Raises UserError for a pair, and for router biases that matter unless they are to be dropped:
    the format has no place for them, so the exported model would route differently.
    """
    if "expert" in params:
        raise UserError(
            "got a pair, whose new expert is stored apart; expected an anchor or a merged model;"
            " merge it first"
        )
    check_bias(params["experts"].get("bias", np.zeros((1, 1))), drop_bias)
    # Cached, so that a leaf is copied from the device once and not for every entry of it.
    leaf = functools.lru_cache(None)(lambda path: np.asarray(_at(params, path)))
    tensors = {}
    for entry in key_table(config, model_type):
        value = leaf(entry.path)[entry.index]
        value = np.ascontiguousarray(value.T if entry.transpose else value)
        if value.shape != entry.shape:
            raise UserError(
                f"{'/'.join(entry.path)} gives {entry.name} shape {value.shape}; expected"
                f" {entry.shape} by the config"
            )
        tensors[entry.name] = value
    return tensors


def from_hf(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], model_type: str | None = None
) -> Params:
    """Parameters from the tensors of a checkpoint, in the tensors' dtypes.

    What the checkpoint lacks is zero: the router row of a dense model and, where the config has
    them, biases. Raises UserError naming tensors that are missing, unexpected or of another shape
    than the config's.
    """
    table = key_table(config, model_type)
    _check_tensors(table, tensors)
    stacks: dict[tuple[str, ...], list[np.ndarray]] = {}
    for entry in table:  # layers and, within them, experts come in order
        value = tensors[entry.name]
        stacks.setdefault(entry.path, []).append(value.T if entry.transpose else value)
    dtype = stacks["experts", "gate"][0].dtype

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        parts = stacks.get(tuple(key.key for key in path))
        if parts is None:
            return jnp.zeros(leaf.shape, dtype)
        return jnp.asarray(np.stack(parts).reshape(leaf.shape))

    shapes = jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def check_bias(bias: np.ndarray, drop: bool) -> float:
    """The lowest router bias [L, E] that matters, or 0.

    Raises UserError where there is one, unless biases are to be dropped. Biases above 0 do not
    matter: the model adds min(bias, 0) to the logits, and nothing for the anchor.
    """
    lowest = float(np.min(np.asarray(bias, np.float32)[:, 1:], initial=0))
    if lowest < 0 and not drop:
        raise UserError(
            f"router biases (down to {lowest:.3g}) have no place in Hugging Face's format;"
            " --drop-bias leaves them out"
        )
    return lowest


def transposed(matrix: np.ndarray) -> np.ndarray:
    """The transpose, contiguous. Copied in squares that stay in the cache, which is several times
    as fast as NumPy's own copy."""
    height, width = matrix.shape
    result = np.empty((width, height), matrix.dtype)
    for i in range(0, height, TILE):
        for j in range(0, width, TILE):
            result[j : j + TILE, i : i + TILE] = matrix[i : i + TILE, j : j + TILE].T
    return result


def _check_tensors(table: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> None:
    expected = {entry.name: entry.shape for entry in table}
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    if missing:
        raise UserError(
            f"missing tensors: {some(missing)}; expected all that config.json describes; {TOGETHER}"
        )
    if extra:
        raise UserError(
            f"unexpected tensors: {some(extra)}; expected only those that config.json describes;"
            f" {TOGETHER}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            raise UserError(f"{name} has shape {got}; expected {shape} by config.json; {TOGETHER}")


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _at(params: Params, path: Sequence[str]) -> Any:
    return functools.reduce(lambda branch, key: branch[key], path, params)
