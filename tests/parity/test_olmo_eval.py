"""Our scoring of multiple choice and gold answers against ai2-olmo-eval's own, as
`record_olmo_eval.py` recorded it."""

import json
from pathlib import Path

import pytest

from flexolmo_jax.evals.tasks import Scored, summarise

RECORDED = json.loads(Path(__file__).with_name("olmo_eval.json").read_text())


@pytest.mark.parametrize("metric", ["acc", "len_norm", "bpb"])
def test_scores_are_upstreams(metric):
    scored = [
        Scored(r["document"], r["choice"], r["label"], r["log_likelihood"], r["continuation"])
        for r in RECORDED["requests"]
    ]
    if metric == "bpb":  # of gold answers alone
        scored = [one._replace(choice=0, label=0) for one in scored if one.choice == one.label]
    ours, upstream = summarise(metric, scored), RECORDED["figures"][metric]
    assert ours["documents"] == 40
    assert ours["bits_per_byte"] == pytest.approx(upstream["bpb_v2"], rel=1e-5)
    if metric != "bpb":
        assert 0 < ours[metric] < 1 and ours[metric] == pytest.approx(
            upstream[f"{metric}_v2"], rel=1e-6
        )
        assert ours["soft"] == pytest.approx(upstream["soft_v2"], rel=1e-5)
