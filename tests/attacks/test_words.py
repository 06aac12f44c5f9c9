"""Words of strangers where others show them. The promise: what an owner says of an expert is text,
whoever reads it."""

import json
import shutil
from pathlib import Path

import pytest

from flexolmo_jax.convert.exporting import export_hf
from flexolmo_jax.coordinator.merge import merge
from flexolmo_jax.exchange.contribution import MANIFEST, sealed

WORDS = "x | y <script>alert(1)</script> [free](https://example.com) ![i](x) `rm -rf /` <!-- -->"


@pytest.mark.parametrize("key", ["owner", "domain", "licence"])
def test_no_markup_of_an_owner_gets_into_a_model_card(anchor, contributions, tmp_path, key):
    """Promise: a contribution cannot put links, scripts or columns onto the page of a model that
    others publish."""
    copy = Path(shutil.copytree(contributions["code"], tmp_path / "copy"))
    (copy / MANIFEST).write_bytes(sealed(json.loads((copy / MANIFEST).read_text()) | {key: WORDS}))
    export_hf(merge(anchor, [copy], tmp_path / "model").path, tmp_path / "hf", drop_bias=True)
    card = (tmp_path / "hf" / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if "alert" in line]
    assert row.startswith("| code |") and row.count("|") == 6 and not set("<>[]`") & set(row)
    assert "script" not in card.replace(row, "")
