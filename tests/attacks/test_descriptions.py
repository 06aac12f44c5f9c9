"""Descriptions that contradict themselves. The promise: what a model says of itself fits together,
or nobody uses it."""

from collections.abc import Callable
from typing import Any

import pytest

from flexolmo_jax.coordinator.merge import opt_out
from flexolmo_jax.coordinator.verify import verify
from flexolmo_jax.errors import UserError
from flexolmo_jax.loaded import load
from tests.attacks.forging import copied, redescribed


@pytest.mark.parametrize(
    ("key", "value"),
    [("rope_theta", 777.0), ("norm_eps", 0.5), ("n_heads", 8), ("max_seq_len", 32)],
)
def test_a_model_runs_with_the_architecture_of_its_fingerprint(model, anchor, tmp_path, key, value):
    """The fingerprint covers the anchor's config; what runs must be that one, but for what a merge
    decides."""
    fake = redescribed(copied(model, tmp_path / "fake"), lambda d: d["model"].update({key: value}))
    for use in (
        lambda: verify(fake),
        lambda: verify(fake, anchor),
        lambda: load(fake),
        lambda: opt_out(fake, ["law"], tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=f"model.{key}|has the shape"):
            use()


def flattened(description: dict[str, Any]) -> None:
    """Members without manifests, as imported models have them."""
    keys = (
        "owner",
        "domain",
        "licence",
        "expires",
        "router_bias",
        "tensors",
        "training",
        "privacy",
    )
    members = [member["manifest"] for member in description["members"]]
    description["members"] = [
        {"name": m["name"], "manifest": None, **{k: m[k] for k in keys}} for m in members
    ]


CONTRADICTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "members without manifests": flattened,
    "no router, said": lambda d: d.update(router=None),
    "no anchor": lambda d: d.pop("anchor"),
    "no anchor, said": lambda d: d.update(anchor=None),
    "no anchor and no fingerprint": lambda d: d.update(anchor=None, fingerprint=None),
    "the anchor of format 1": lambda d: d.update(anchor=d["anchor"]["tensors"]),
    "format 1 with the anchor of format 2": lambda d: d.update(format=1),
    "an anchor without its embedder": lambda d: d["anchor"].pop("embedder"),
    "an anchor without a model": lambda d: d["anchor"].update(model=None),
    "no fingerprint": lambda d: d.update(fingerprint=None),
    "a member too few": lambda d: d["members"].pop(),
    "an expert's name twice": lambda d: d.update(experts=["anchor", "code", "code", "care"]),
    "rows tuned with nobody": lambda d: d.update(router={"tuned_with": [], "tensors": {}}),
    "imported, said of a merge": lambda d: d.update(imported=None),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_description_that_contradicts_itself_is_refused_by_every_reader(
    model, anchor, tmp_path, what
):
    """Each of these once ended some verb in a traceback, or let a claim through unchecked."""
    fake = redescribed(copied(model, tmp_path / "fake"), CONTRADICTIONS[what])
    for use in (
        lambda: verify(fake),
        lambda: verify(fake, anchor),
        lambda: load(fake),
        lambda: opt_out(fake, ["law"], tmp_path / "out"),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert "\n" not in str(error.value)
