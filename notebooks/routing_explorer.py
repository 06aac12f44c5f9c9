# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which expert does each token use?
#
# Give it a merged model (`make demo` leaves one in `demo/merged`; the quickstart one in `merged`)
# and a text of your own: every token is drawn in the colour of its likeliest expert, by layer.
# Set `FLEXOLMO_MODEL` to the model's path.

# %%
import os

MODEL = os.environ.get("FLEXOLMO_MODEL", "merged")
TEXT = '''def permission(self, licence):
    """Permission is hereby granted, free of charge, to any person obtaining a copy."""
    return self.licence == licence'''

# %% [markdown]
# ## Run the text through the model and keep what the routers said

# %%
import jax.numpy as jnp
import numpy as np

import flexolmo_jax
from flexolmo_jax.model import forward

model = flexolmo_jax.load(MODEL)
ids = model.tokenizer.encode(TEXT)
output = forward(model.config, model.params, jnp.asarray([ids]), active=len(model.experts))
probabilities = np.asarray(output.router.probabilities)[:, 0]  # [layers, tokens, experts]
print(model.experts, probabilities.shape)

# %% [markdown]
# ## Draw it

# %%
import html

from IPython.display import HTML, display

COLOURS = ["#d9dde2", "#8ec9f0", "#ffb684", "#7fd6b5", "#e5a8cd", "#e9c46a", "#b8a9e6", "#c7c7c7"]


def tokens_in_colour(of_layer: np.ndarray) -> str:
    """of_layer: [tokens, experts]."""
    spans = []
    for token, shares in zip(ids, of_layer, strict=True):
        colour = COLOURS[int(shares.argmax()) % len(COLOURS)]
        title = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(model.experts, shares, strict=True)
        )
        text = html.escape(model.tokenizer.decode([token]))
        text = text.replace("\n", "⏎<br>").replace(" ", "&nbsp;")
        spans.append(
            f'<span title="{html.escape(title)}" style="background:{colour}">{text}</span>'
        )
    style = "font-family:monospace;color:#111;background:#fff;padding:6px;line-height:1.7"
    return f'<div style="{style}">{"".join(spans)}</div>'


legend = " ".join(
    f'<span style="background:{COLOURS[i % len(COLOURS)]};color:#111;padding:2px 8px">'
    f"{html.escape(name)}</span>"
    for i, name in enumerate(model.experts)
)
layers = "".join(
    f"<h4>layer {layer}</h4>{tokens_in_colour(of_layer)}"
    for layer, of_layer in enumerate(probabilities)
)
display(HTML(f"{legend}<h4>mean over layers</h4>{tokens_in_colour(probabilities.mean(0))}{layers}"))

# %% [markdown]
# ## Shares by layer

# %%
print("layer  " + "  ".join(f"{name:>10}" for name in model.experts))
for layer, shares in enumerate(probabilities.mean(1)):
    print(f"{layer:5}  " + "  ".join(f"{share:10.1%}" for share in shares))
assert np.allclose(probabilities.sum(-1), 1, atol=1e-4)
