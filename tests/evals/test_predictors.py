"""Ensembles: each against its definition written as a loop, and none knows a token before it has
predicted it."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from flexolmo_jax.data.records import open_records
from flexolmo_jax.evals.bits_per_byte import evaluate
from flexolmo_jax.evals.predictors import (
    BranchTrainMerge,
    OfModel,
    Predictor,
    PromptRouting,
    Remembered,
    Soup,
    WeightedSoup,
    bits_per_byte,
)
from flexolmo_jax.loaded import LoadedModel, load
from flexolmo_jax.train.pretrain import pretrain
from tests.tiny import run_config

PROMPT = 6


@pytest.fixture(scope="module")
def dense(anchor, prepared, tmp_path_factory) -> list[LoadedModel]:
    """The anchor, and two models that it became on text of their own."""
    folder = tmp_path_factory.mktemp("dense")
    for domain in ("code", "law"):
        pretrain(
            run_config(
                "anchor", prepared[domain], f"train.init={anchor}", "train.steps=6", "optim.lr=1e-2"
            ),
            folder / domain,
        )
    return [load(anchor), load(folder / "code"), load(folder / "law")]


def kinds(dense: list[LoadedModel]) -> dict[str, Predictor]:
    each = [Remembered(OfModel(model)) for model in dense]
    return {
        "model": each[1],
        "BTM": BranchTrainMerge(each),
        "BTM, top 2": BranchTrainMerge(each, top=2),
        "BTM, top 1": BranchTrainMerge(each, top=1),
        "BTM, switching": BranchTrainMerge(each, switch=0.01),
        "prompt routing": PromptRouting(each, lambda ids: sum(ids) % 3, PROMPT),
        "soup": Soup(dense),
        "weighted soup": WeightedSoup(dense, PROMPT),
    }


@pytest.fixture(scope="module")
def batch(prepared) -> tuple[np.ndarray, np.ndarray]:
    chosen = []
    for domain in ("code", "law"):
        records = open_records(prepared[domain], "train")
        several = [
            i for i in range(len(records)) if (records[i]["segments"] == 2).sum() > PROMPT + 2
        ]
        chosen += [records[i] for i in (0, *several[:2])]
    tokens, segments = (np.stack([one[key] for one in chosen]) for key in ("tokens", "segments"))
    return tokens, segments


def test_bits_per_byte_are_those_of_eval(model, dense, prepared):
    for loaded, selection in (
        (load(model), {}),
        (load(model), {"without": ["law"], "active": 1}),
        (dense[1], {}),
    ):
        records = open_records(prepared["law"], "heldout")
        expected = evaluate(loaded, [prepared["law"]], **selection)["bits_per_byte"]["law"]
        ours = bits_per_byte(
            OfModel(loaded, **selection),
            [records[i] for i in range(len(records))],
            loaded.tokenizer,
            batch_size=4,
        )
        assert ours == pytest.approx(expected, rel=1e-6)


def test_eval_tells_the_bits_and_bytes_of_each_record(model, prepared):
    loaded = load(model)
    records = open_records(prepared["law"], "heldout")
    count = len(records)
    found = evaluate(loaded, [prepared["law"]], batch_size=count - 1)  # the last batch has padding
    by_record = np.array(found["by_record"]["law"])
    assert by_record.shape == (count, 2)
    bits, n_bytes = by_record.sum(axis=0)
    assert n_bytes == found["bytes"]["law"]
    assert bits / n_bytes == pytest.approx(found["bits_per_byte"]["law"])
    last = bits_per_byte(OfModel(loaded), [records[count - 1]], loaded.tokenizer, batch_size=1)
    assert by_record[-1, 0] / by_record[-1, 1] == pytest.approx(last, rel=1e-5)


@pytest.mark.parametrize(
    "kind",
    [
        *("model", "BTM", "BTM, top 2", "BTM, top 1", "BTM, switching"),
        *("prompt routing", "soup", "weighted soup"),
    ],
)
def test_what_comes_later_and_what_is_packed_beside_changes_nothing(kind, dense, batch):
    predictor = kinds(dense)[kind]
    tokens, segments = batch
    losses, T = predictor.losses(tokens, segments), tokens.shape[1]
    rng = np.random.default_rng(0)
    for t in (3, PROMPT + 1, T - 2):
        changed = tokens.copy()
        changed[:, t + 1 :] = rng.integers(0, 300, changed[:, t + 1 :].shape)
        np.testing.assert_allclose(
            predictor.losses(changed, segments)[:, 1 : t + 1],
            losses[:, 1 : t + 1],
            rtol=2e-5,
            atol=2e-5,
        )
    record, second = next((record, s) for record, s in enumerate(segments) if s.max() > 1)
    start, end = np.flatnonzero(second == 2)[[0, -1]]
    alone = np.zeros((1, T), int), np.zeros((1, T), int)
    alone[0][0, : end + 1 - start], alone[1][0, : end + 1 - start] = (
        tokens[record, start : end + 1],
        1,
    )
    np.testing.assert_allclose(
        predictor.losses(*alone)[0, 1 : end + 1 - start],
        losses[record, start + 1 : end + 1],
        rtol=2e-5,
        atol=2e-5,
    )


@pytest.mark.parametrize("top", [1, 2, 3])
def test_branch_train_merge_is_a_mixture_by_what_each_model_lost_before(top, dense, batch):
    each = [OfModel(model).losses(*batch) for model in dense]
    losses = BranchTrainMerge([OfModel(model) for model in dense], top, temperature=2.0).losses(
        *batch
    )
    for record, segments in enumerate(batch[1]):
        for t in range(1, len(segments)):
            if segments[t] == 0 or segments[t] != segments[t - 1]:
                continue
            start = int(np.flatnonzero(segments == segments[t])[0])
            lost = np.array([own[record, start + 1 : t].sum() for own in each])
            best = sorted(range(3), key=lambda m: lost[m])[:top]
            posterior = np.exp(-(lost[best] - lost[best].min()) / 2.0)
            mixed = sum(
                p * np.exp(-each[m][record, t])
                for p, m in zip(posterior / posterior.sum(), best, strict=True)
            )
            assert losses[record, t] == pytest.approx(-np.log(mixed), rel=1e-4)


class Given:
    """A predictor with these losses, whatever it is asked."""

    def __init__(self, losses: list[float]):
        self._losses = np.array([losses], np.float32)

    def losses(self, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
        return self._losses


def test_a_switching_mixture_follows_a_document_that_changes_its_domain():
    tokens = segments = np.ones((1, 8), np.int32)
    first, second = [0.0, *[0.1] * 3, *[4.0] * 4], [0.0, *[4.0] * 3, *[0.1] * 4]
    models: list[Predictor] = [Given(first), Given(second)]
    switch, shares, expected = 0.05, np.array([0.5, 0.5]), []
    for own in np.array([first, second]).T[1:]:
        expected.append(-np.log(np.sum(shares * np.exp(-own))))
        shares = shares * np.exp(-own) / np.sum(shares * np.exp(-own))
        shares = (1 - switch) * shares + switch * 0.5
    found = BranchTrainMerge(models, switch=switch).losses(tokens, segments)[0, 1:]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    # three tokens of evidence have to be made up for by one that cannot switch
    still = BranchTrainMerge(models).losses(tokens, segments)[0, 1:]
    np.testing.assert_allclose(found[0], still[0], rtol=1e-6)
    assert found.sum() < still.sum() - 2


def test_prompt_routing_sends_a_document_to_the_model_of_its_prompt(dense, batch):
    tokens, segments = batch
    prompts = []

    def classify(ids):
        prompts.append(tuple(ids))
        return 2

    losses = PromptRouting([OfModel(model) for model in dense], classify, PROMPT).losses(
        tokens, segments
    )
    first, last = (
        OfModel(dense[0]).losses(tokens, segments),
        OfModel(dense[2]).losses(tokens, segments),
    )
    long = 0
    for record, own in enumerate(segments):
        for segment in range(1, own.max() + 1):
            places = np.flatnonzero(own == segment)
            np.testing.assert_array_equal(
                losses[record, places[1:PROMPT]], first[record, places[1:PROMPT]]
            )
            np.testing.assert_array_equal(
                losses[record, places[PROMPT:]], last[record, places[PROMPT:]]
            )
            if len(places) > PROMPT:
                long += 1
                assert tuple(tokens[record, places[:PROMPT]]) in prompts
    assert long == len(prompts) > 0


def losses_of(params, like: LoadedModel) -> Callable:
    return OfModel(LoadedModel(like.artifact, params)).losses


def test_soups_are_models_of_averaged_weights(dense, batch):
    segments = batch[1]

    def soup(*shares: float):
        return jax.tree.map(
            lambda *a: sum(s * x.astype(np.float32) for s, x in zip(shares, a, strict=True)),
            *(m.params for m in dense),
        )

    np.testing.assert_allclose(
        Soup(dense).losses(*batch),
        losses_of(soup(1 / 3, 1 / 3, 1 / 3), dense[1])(*batch),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        Soup(dense, [0, 0, 1]).losses(*batch),
        OfModel(dense[2]).losses(*batch),
        rtol=1e-5,
        atol=1e-6,
    )
    places = np.flatnonzero(segments[0] == 1)
    lost = np.array([OfModel(model).losses(*batch)[0, places[1:PROMPT]].sum() for model in dense])
    shares = np.exp(-(lost - lost.min()))
    expected = losses_of(soup(*(shares / shares.sum())), dense[1])(*batch)[0, places[PROMPT:]]
    np.testing.assert_allclose(
        WeightedSoup(dense, PROMPT).losses(*batch)[0, places[PROMPT:]],
        expected,
        rtol=1e-4,
        atol=1e-5,
    )


def test_nonsense_is_refused(dense):
    with pytest.raises(ValueError, match="expected 1 to 1"):
        BranchTrainMerge([OfModel(dense[0])], top=2)
    with pytest.raises(ValueError, match="temperature 0"):
        BranchTrainMerge([OfModel(dense[0])], temperature=0)
    with pytest.raises(ValueError, match="switch 1"):
        BranchTrainMerge([OfModel(dense[0])], switch=1)
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(OfModel(dense[0]), [], dense[0].tokenizer)
