"""Which expert is which: names go through an export and back, and are believed by digest."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexolmo_jax import cli
from flexolmo_jax.artifact import open_artifact
from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.convert.identity import KEY, TERMS
from flexolmo_jax.convert.importing import import_hf
from flexolmo_jax.errors import UserError

ROUTER = "model.layers.{}.mlp.gate.weight"
FFN = "model.layers.{}.mlp.experts.{}.{}_proj.weight"


@pytest.fixture
def exported(model, tmp_path) -> Path:
    export_hf(model, tmp_path / "hf", drop_bias=True)
    return tmp_path / "hf"


def change(directory: Path, edit) -> None:
    fields = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    edit(tensors, fields)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(fields))


def swap(tensors, fields) -> None:
    """Experts 1 and 2 change places, in every layer."""
    for layer in range(fields["num_hidden_layers"]):
        router = tensors[ROUTER.format(layer)]
        router[[1, 2]] = router[[2, 1]]
        for kind in ("gate", "up", "down"):
            one, two = (FFN.format(layer, expert, kind) for expert in (1, 2))
            tensors[one], tensors[two] = tensors[two], tensors[one]


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_names_and_terms_come_back_from_an_export(model, tmp_path, dtype):
    export_hf(model, tmp_path / "hf", drop_bias=True, dtype=dtype)
    before, back = open_artifact(model), import_hf(tmp_path / "hf", tmp_path / "back")
    assert back.experts == before.experts
    for ours, theirs in zip(back.members, before.members, strict=True):
        assert [ours[key] for key in TERMS] == [theirs["manifest"][key] for key in TERMS]


def test_a_pairs_expert_keeps_its_name(pair_runs, tmp_path):
    export_hf(pair_runs["code"], tmp_path / "hf", drop_bias=True)
    assert import_hf(tmp_path / "hf", tmp_path / "back").experts == ("anchor", "code")


def test_an_expert_that_changed_its_place_keeps_its_name(exported, model, tmp_path):
    anchor, one, two, *rest = open_artifact(model).experts
    change(exported, swap)
    assert import_hf(exported, tmp_path / "back").experts == (anchor, two, one, *rest)


def test_names_that_contradict_the_digests_are_refused(exported, model, tmp_path):
    _, one, two, *rest = open_artifact(model).experts
    with pytest.raises(UserError, match=f"call expert 1 '{two}'; by its digest it is '{one}'"):
        import_hf(exported, tmp_path / "back", [two, one, *rest])
    assert not (tmp_path / "back").exists()
    assert import_hf(exported, tmp_path / "back", [one, two, *rest]).experts[1] == one


def test_an_expert_that_was_trained_on_is_not_called_what_it_was(exported, model, tmp_path):
    def train(tensors, fields):
        tensors[FFN.format(0, 1, "up")][0, 0] += 1

    change(exported, train)
    with pytest.raises(UserError, match=r"expert 1 is none of those that config\.json names"):
        import_hf(exported, tmp_path / "back")
    names = ["mine", *open_artifact(model).experts[2:]]
    back = import_hf(exported, tmp_path / "back", names)
    assert back.experts[1:] == tuple(names) and back.members[0]["owner"] == ""


@pytest.mark.parametrize(
    "note",
    [
        "text",
        {"experts": []},
        {"experts": [{"name": "../a", "sha256": "0" * 64}] * 2},
        {"experts": [{"name": "a", "sha256": "0" * 64}] * 2},
        {"experts": [{"name": "a"}, {"name": "b"}]},
        {"experts": [{"name": "anchor", "sha256": "0" * 64}, {"name": "b", "sha256": "0" * 64}]},
        {"experts": [{"name": "a", "sha256": "0" * 64, "owner": "x" * 2000}]},
    ],
)
def test_a_note_that_cannot_be_right_is_refused(exported, tmp_path, note):
    change(exported, lambda tensors, fields: fields.update({KEY: note}))
    with pytest.raises(UserError, match=f"{KEY}.*remove that key, or export again"):
        import_hf(exported, tmp_path / "back")


def test_names_for_a_checkpoint_that_says_nothing_are_said_to_be_a_users(
    checkpoint, tmp_path, capsys
):
    import_hf(checkpoint(), tmp_path / "model", ["a", "b"])
    assert "nothing in the checkpoint says which expert is which" in capsys.readouterr().err


def single(checkpoint: Path, expert: int, out: Path) -> Path:
    """A checkpoint of the anchor and one expert, whose router has been trained again."""
    shutil.copytree(checkpoint, out)

    def keep(tensors, fields):
        fields["num_experts"] = fields["num_experts_per_tok"] = 2
        for name in [name for name in tensors if ".mlp." in name]:
            if name.endswith("mlp.gate.weight"):
                tensors[name] = np.ascontiguousarray(tensors[name][[0, expert]]) * 2
        for layer in range(fields["num_hidden_layers"]):
            for kind in ("gate", "up", "down"):
                tensors[FFN.format(layer, 1, kind)] = tensors[FFN.format(layer, expert, kind)]
                del tensors[FFN.format(layer, 2, kind)]

    change(out, keep)
    return out


def test_experts_are_found_by_checkpoints_of_single_ones(checkpoint, tmp_path, capsys):
    both = checkpoint()
    poetry = single(both, 2, tmp_path / "poetry")
    command = ["import-hf", str(both), str(tmp_path / "model"), "--match", f"poetry={poetry}"]
    assert cli.main(command) == 0
    assert open_artifact(tmp_path / "model").experts == ("anchor", "expert1", "poetry")
    assert "no given checkpoint holds the others: expert1" in capsys.readouterr().err


def test_a_single_expert_that_is_not_there_is_refused(checkpoint, tmp_path):
    both = checkpoint()
    other = single(both, 1, tmp_path / "other")
    change(other, lambda tensors, _: tensors[FFN.format(1, 1, "up")].fill(0))
    with pytest.raises(UserError, match="--match poetry: its matrices are those of 0 of the 2"):
        import_hf(both, tmp_path / "model", match={"poetry": other})
    with pytest.raises(UserError, match="has 3 experts; expected a dense model, or an anchor"):
        import_hf(both, tmp_path / "model", match={"poetry": both})
    with pytest.raises(UserError, match="got --names and --match"):
        import_hf(both, tmp_path / "model", ["a", "b"], match={"poetry": other})
    assert not (tmp_path / "model").exists()


def test_a_card_says_what_was_dropped_what_was_measured_and_how_to_use_it(exported, model):
    card = (exported / "README.md").read_text()
    assert "router's biases (down to -" in card and "What that changes was not measured" in card
    assert open_artifact(model).fingerprint in card
    assert "license: other" in card and "from_pretrained(" in card
    for member in open_artifact(model).members:
        for text, bits in member["manifest"]["training"]["bits_per_byte"]["pair"].items():
            assert f"| {member['name']} | {text} |" in card and f"{bits:.4f}" in card


def test_names_come_back_where_weights_are_cast(exported, model, tmp_path):
    back = import_hf(exported, tmp_path / "back", dtype="float32")
    assert back.experts == open_artifact(model).experts and back.dtype == "float32"
