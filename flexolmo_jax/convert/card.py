"""The model card of an export: what it is, who made which expert on what terms, how to use it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flexolmo_jax.artifact import Artifact
from flexolmo_jax.config import ModelConfig
from flexolmo_jax.errors import printable
from flexolmo_jax.integrity import manifest_of

from .families import family_of

ROW = 16  # bytes: torch's `grouped_mm` takes rows of multiples of these
USE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{options})
tokenizer = AutoTokenizer.from_pretrained("PATH")
ids = tokenizer("The", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=64)[0]))
```

PATH is this directory, or this model's name on the hub. `flexolmo import-hf PATH model` makes a
model of flexolmo-jax of it{again}."""


def model_card(
    artifact: Artifact,
    config: ModelConfig,
    dtype: str,
    lowest_bias: float,
    scores: Mapping[str, Any],
) -> str:
    """Markdown with the front matter that Hugging Face's hub reads.

    Args:
        config: of what is exported.
        lowest_bias: of the router, below 0 where biases were dropped.
        scores: with `bits_per_byte`, if it was scored with and without them.
    """
    is_mixture = config.n_experts > 1
    what = f"A mixture of {config.n_experts} experts" if is_mixture else "A dense model"
    anchor = _plain(artifact.fingerprint or "not published")
    options = ', experts_implementation="eager"' if rows_advice(config, dtype) else ""
    again = ", with its experts under their names" if is_mixture else ""
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: other\n"
        "tags: [flexolmo-jax]\n---",
        f"# {_plain(artifact.path.name)}",
        f"{what} ({family_of(config)}, {dtype}), exported by flexolmo-jax. Anchor: {anchor}.",
        _experts(artifact) if is_mixture else "",
        _figures(artifact),
        _biases(lowest_bias, scores),
        "## Licence\n\nThe anchor is under the licence of whoever published it, which is not"
        " recorded here." + (" Each expert is under its owner's, above." if is_mixture else ""),
        USE.format(options=options, again=again),
        rows_advice(config, dtype),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def rows_advice(config: ModelConfig, dtype: str) -> str:
    """Of a mixture that transformers' default product of groups refuses; else nothing."""
    rows = [size * np.dtype(dtype).itemsize for size in (config.d_model, config.d_ffn)]
    if config.n_experts == 1 or not any(row % ROW for row in rows):
        return ""
    return (
        f"Rows of the experts' matrices have {rows[0]} and {rows[1]} bytes. transformers'"
        f" grouped_mm needs multiples of {ROW}: load this model with"
        ' experts_implementation="eager".'
    )


def _experts(artifact: Artifact) -> str:
    """Who made which expert on what terms; then those that were trained with privacy."""
    members = _members(artifact)
    rows, private = [], []
    for name in artifact.experts:
        about = members.get(name, {})
        terms = map(about.get, ("owner", "domain", "licence", "expires"))
        rows.append([*map(_plain, (name, *terms))])
        if isinstance(bounds := about.get("privacy"), Mapping):
            epsilon, delta = bounds["epsilon"], bounds["delta"]
            private.append(f"{_plain(name)} (epsilon {epsilon:g}, delta {delta:g})")
    table = _table(["expert", "owner", "domain", "licence", "expires"], rows)
    if private:
        table += f"\n\nTrained with differential privacy, as owners say: {', '.join(private)}."
    return table


def _figures(artifact: Artifact) -> str:
    """What owners measured, by expert and text."""
    rows = []
    for name, about in _members(artifact).items():
        scores = about.get("training", {}).get("bits_per_byte", {})
        for text, before in scores.get("anchor", {}).items():
            if (after := scores.get("pair", {}).get(text)) is not None:
                rows.append([_plain(name), _plain(text), f"{before:.4f}", f"{after:.4f}"])
    if not rows:
        return ""
    said = "## Figures\n\nBits per byte of held-out text, measured where each expert was trained:"
    return f"{said}\n\n{_table(['expert', 'text', 'anchor', 'anchor and expert'], rows)}"


def _biases(lowest: float, scores: Mapping[str, Any]) -> str:
    if lowest == 0:
        return ""
    said = (
        f"The router's biases (down to {lowest:.3g}) were dropped: this format has no place for"
        " them. Routers choose the owners' experts a little more often than in the model that this"
        " was made of."
    )
    if not scores:
        return said + " What that changes was not measured."
    lines = [
        f"- {name}: {', '.join(f'{_plain(text)} {bits:.4f}' for text, bits in each.items())}"
        for name, each in scores["bits_per_byte"].items()
    ]
    return "\n".join([said + " Bits per byte:", "", *lines])


def _members(artifact: Artifact) -> dict[str, Mapping[str, Any]]:
    return {member["name"]: manifest_of(member) or member for member in artifact.members}


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _plain(text: Any) -> str:
    """Strangers' words for a page: letters and digits as they are, the rest as HTML's character
    numbers.

    Markdown does not interpret those: nothing becomes markup or a link, or ends a line or a cell.
    """
    letters = printable(str(text or ""))
    return "".join(c if c.isalnum() or c in " ," else f"&#{ord(c)};" for c in letters)
