"""Top-k routing with its gradient, and the plan that takes tokens to their experts and back."""

from .api import dispatch_plan, route_topk
from .reference import DispatchPlan, Routing, dense_probabilities, router_probabilities

__all__ = [
    "DispatchPlan",
    "Routing",
    "dense_probabilities",
    "dispatch_plan",
    "route_topk",
    "router_probabilities",
]
