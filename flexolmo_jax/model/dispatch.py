"""Tokens travel to the devices of the experts that they chose, and what these say travels back.

Experts are spread over X devices of a mesh's expert axis, and each has n tokens of its own with A
slots each. Tokens go in rounds of equal size, C slots from every device to every other:

    the slots of this round -> all to all -> the own experts -> all to all -> sums by token

A round's size does not depend on what the router chose, so its buffers hold X C slots and not all
A n X. Where experts are chosen evenly one round is enough. Where one is chosen by many, more rounds
follow: no token is dropped.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexolmo_jax.kernels import Kernels, names
from flexolmo_jax.kernels.moe_ffn import sparse_experts
from flexolmo_jax.kernels.permute import combine, permute, permute_probabilities
from flexolmo_jax.kernels.route import DispatchPlan, Routing, dispatch_plan
from flexolmo_jax.runtime.sharding import ExpertAxis

SLACK = 1.25  # a round's size beside what even choices need
FEWEST = 128  # slots of a round for each device: fewer gain nothing


class Slots(NamedTuple):
    """Where a device's slots go."""

    device: Int[Array, "n A"]  # of the slot's expert
    expert: Int[Array, "n A"]  # its number on that device
    turn: Int[Array, "n A"]  # the slot's place among all that go there
    chosen: Bool[Array, "n A"]  # False: it goes nowhere
    layer: Int[Array, ""] | None  # of the experts, where their matrices are those of all layers


class Values(NamedTuple):
    """What has a gradient."""

    x: Float[Array, "n D"]
    probabilities: Float[Array, "n A"]
    gate: Float[Array, "*L E D F"]
    up: Float[Array, "*L E D F"]
    down: Float[Array, "*L E F D"]


def run_chosen(
    kernels: Kernels,
    axis: ExpertAxis,
    inputs: tuple[tuple[Float[Array, "n D"], Routing], Int[Array, ""] | None],
    gate: Float[Array, "*L E D F"],
    up: Float[Array, "*L E D F"],
    down: Float[Array, "*L E F D"],
) -> Float[Array, "n D"]:
    """What the chosen experts give for a device's tokens. `E` experts lie on each device.

    With a layer in `inputs` the matrices are those of all layers.
    """
    (x, routing), layer = inputs
    if axis.size == 1:
        return sparse_experts(x, routing, gate, up, down, layer, kernels=kernels)
    (tokens, active), count = routing.ids.shape, gate.shape[-3]
    device, chosen = routing.ids // count, routing.probabilities > 0
    sizes, places, _ = dispatch_plan(device, chosen, axis.size, kernels=kernels)
    turn = places - (jnp.cumsum(sizes) - sizes)[device]
    slots = Slots(device, routing.ids % count, turn, chosen, layer)
    values = Values(x, routing.probabilities, gate, up, down)
    exchange = Exchange(kernels, axis, round_size(tokens, active, axis.size, count))
    y = exchange.round(jnp.int32(0), slots, values)
    if exchange.size == _most(tokens, active, count):
        return y
    rounds = axis.largest(-(-jnp.max(sizes) // exchange.size))
    further: Any = _further_rounds(exchange, rounds, slots, values)
    return (y + further).astype(x.dtype)


def round_size(tokens: int, active: int, devices: int, experts: int) -> int:
    """How many slots of a device go to each of the others in a round.

    `experts`: of each device. A token chooses an expert once, so that more than `active` or
    `experts` of its slots never go to one device.
    """
    even = math.ceil(SLACK * tokens * active / devices / FEWEST) * FEWEST
    return min(even, _most(tokens, active, experts))


def _most(tokens: int, active: int, experts: int) -> int:
    return tokens * min(active, experts)


@dataclass(frozen=True)
class Exchange:
    """How slots travel."""

    kernels: Kernels
    axis: ExpertAxis
    size: int  # slots that go to each device in a round

    def round(self, number: Int[Array, ""], slots: Slots, values: Values) -> Float[Array, "n D"]:
        """The sums over those slots of each token whose turn is in this round."""
        plan = self._plan(number, slots)
        there_and_back = self.axis.exchange
        # not "pallas", whose kernels for a TPU's other cores want unused places behind all groups
        moving: Kernels = "xla" if self.kernels == "xla" else "auto"
        tokens = there_and_back(permute(values.x, plan, kernels=moving))
        probabilities = permute_probabilities(values.probabilities, plan, kernels=moving)
        experts = jnp.take(slots.expert.reshape(-1), plan.slots, mode="fill", fill_value=0)
        probabilities, experts = map(there_and_back, (probabilities, experts))
        arrived = Routing(probabilities[:, None], experts[:, None], jnp.zeros_like(probabilities))
        matrices = values.gate, values.up, values.down
        outputs = sparse_experts(tokens, arrived, *matrices, slots.layer, kernels=self.kernels)
        return combine(there_and_back(outputs), plan, kernels=moving)

    def _plan(self, number: Int[Array, ""], slots: Slots) -> DispatchPlan:
        """The places of a round: `size` for the first device, then for the second, and so on, each
        with unused ones at its end."""
        total = self.axis.size * self.size
        turn = slots.turn - number * self.size
        goes = slots.chosen & (turn >= 0) & (turn < self.size)
        places = jnp.where(goes, slots.device * self.size + turn, total)
        back = jnp.full(total, places.size, jnp.int32)
        back = back.at[places.reshape(-1)].set(
            jnp.arange(places.size, dtype=jnp.int32), mode="drop", unique_indices=True
        )
        return DispatchPlan(jnp.sum(goes).reshape(1), places, back)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further_rounds(
    exchange: Exchange, rounds: Int[Array, ""], slots: Slots, values: Values
) -> Float[Array, "n D"]:
    """The sum of all rounds but the first, in float32. Its gradient runs them again."""

    def add(number: Int[Array, ""], y: Array) -> Array:
        return y + exchange.round(number, slots, values)

    with jax.named_scope(names.FURTHER_ROUNDS):
        return jax.lax.fori_loop(1, rounds, add, jnp.zeros(values.x.shape, jnp.float32))


def _further_forward(exchange: Exchange, *arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    return _further_rounds(exchange, *arguments), arguments


def _further_backward(exchange: Exchange, arguments: Any, dy: Float[Array, "n D"]):
    rounds, slots, values = arguments
    dy = dy.astype(values.x.dtype)

    def add(number: Int[Array, ""], gradients: Values) -> Values:
        _, gradient = jax.vjp(functools.partial(exchange.round, number, slots), values)
        return jax.tree.map(jnp.add, gradients, gradient(dy)[0])

    with jax.named_scope(names.FURTHER_ROUNDS):
        zeros = jax.tree.map(jnp.zeros_like, values)
        return None, None, jax.lax.fori_loop(1, rounds, add, zeros)


_further_rounds.defvjp(_further_forward, _further_backward)
