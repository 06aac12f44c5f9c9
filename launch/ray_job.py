"""A RayJob of one owner (a copy of launch/ray/kuberay.yaml), for launch/check_isolation."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flexolmo_jax.errors import UserError  # noqa: E402

OWNER = "flexolmo/owner"  # the label that names the owner
BUCKETS = re.compile(r"gs://([-_.a-z0-9]+)")
# pods of the same namespace
OWN_PODS: dict[str, Any] = {"from": [{"podSelector": {}}]}


@dataclass(frozen=True)
class RayJob:
    owner: str
    namespace: str
    service_account: str  # of the namespace
    bucket: str  # of the command's --out
    command: str


def ray_job(path: Path, documents: list[Any]) -> RayJob:
    """The RayJob of a file's YAML documents.

    Raises UserError for one that another owner's pods could reach, whose pods act as different
    accounts, or whose command writes into no bucket.
    """
    try:
        (job,) = (one for one in documents if one["kind"] == "RayJob")
        meta, spec = job["metadata"], job["spec"]
        cluster, command = spec["rayClusterSpec"], " ".join(spec["entrypoint"].split())
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        accounts = {group["template"]["spec"].get("serviceAccountName") for group in groups}
        owner, namespace = meta["labels"][OWNER], meta["namespace"]
        policies = [one for one in documents if one["kind"] == "NetworkPolicy"]
        policies = [one for one in policies if one["metadata"]["namespace"] == namespace]
        # Policies add up: what one lets in, no other keeps out.
        is_closed = any(map(_is_closed, policies)) and all(map(_lets_in_own, policies))
        has_token = cluster.get("authOptions", {}).get("mode") == "token"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is no RayJob as in launch/ray/kuberay.yaml: {type(error).__name__} {error}"
        ) from None
    if not is_closed or not has_token:
        raise UserError(
            f"{path} lets pods of other namespaces reach Ray; give it the NetworkPolicy and"
            " authOptions of launch/ray/kuberay.yaml"
        )
    if len(accounts) != 1 or None in accounts:
        raise UserError(f"{path} has pods that act as {accounts}; expected one serviceAccountName")
    out = re.search(rf"--out[ =]{BUCKETS.pattern}", command)
    if out is None:
        raise UserError(f"{path}: its command has no --out gs://...; give the owner's bucket")
    return RayJob(owner, namespace, f"{namespace}/{accounts.pop()}", out[1], command)


def _is_closed(policy: dict[str, Any]) -> bool:
    """Whether a policy is of all pods, which then get in what policies say and nothing else."""
    spec = policy["spec"]
    return spec["podSelector"] == {} and "Ingress" in spec["policyTypes"]


def _lets_in_own(policy: dict[str, Any]) -> bool:
    """Whether a policy lets pods of other namespaces reach no more than Ray's dashboard."""
    others = [rule for rule in policy["spec"].get("ingress") or () if rule != OWN_PODS]
    return all(rule.get("ports") == [{"port": 8265}] for rule in others)
