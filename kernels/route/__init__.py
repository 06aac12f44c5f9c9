"""Top-k routing with its gradient, and the plan by which a sparse mixture moves tokens to experts
and back."""

from .api import Implementation, dispatch_plan, route_topk
from .reference import DispatchPlan, Routing, dense_weights, router_probabilities

__all__ = [
    "DispatchPlan",
    "Implementation",
    "Routing",
    "dense_weights",
    "dispatch_plan",
    "route_topk",
    "router_probabilities",
]
