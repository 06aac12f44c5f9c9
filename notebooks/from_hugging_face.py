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
# # From Hugging Face weights to a merged model
#
# Any OLMo 2 checkpoint can be an anchor: import it, publish it, let an owner train an expert
# against it, merge, and go back to Hugging Face's format. Set `HF_CHECKPOINT` to a directory with
# `config.json`, `*.safetensors` and `tokenizer.json` (`huggingface-cli download
# allenai/OLMo-2-0425-1B --local-dir olmo2`); a Colab TPU holds the 1B. Without one a small model is
# trained and exported first, so that the notebook runs anywhere.

# %%
import importlib.util
import os
import sys

if importlib.util.find_spec("flexolmo_jax") is None:
    # !pip install -q flexolmo-jax
    pass
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

# %%
import jax

print(jax.devices())
os.environ["HF_CHECKPOINT"] = os.environ.get("HF_CHECKPOINT", "olmo2")
os.environ["STEPS"] = "40" if jax.default_backend() == "cpu" else "500"
if jax.default_backend() != "cpu":  # the commands below need the device that this process holds
    jax.extend.backend.clear_backends()

# %% [markdown]
# ## Public and private text, and a checkpoint where there is none

# %% language="bash"
# set -e
# flexolmo data fetch text --domain public --domain legal --max-mb 0.5
# if [ ! -e "$HF_CHECKPOINT" ]; then
#   flexolmo tokenizer train --input text/public.jsonl --vocab-size 1024 --out tokenizer.json
#   cat > small.yaml <<EOF
# run: anchor
# model:
#   {preset: tiny, d_model: 64, n_layers: 2, n_heads: 4, n_kv_heads: 4, d_ffn: 256, init_std: 0.1}
# data: {train: [{path: text/public.jsonl}], tokenizer: tokenizer.json, batch_size: 8, seq_len: 256}
# train: {steps: 100}
# optim: {lr: 8.0e-3, warmup: 20}
# EOF
#   flexolmo train small.yaml --out small
#   flexolmo export-hf small "$HF_CHECKPOINT"
# fi
# ls "$HF_CHECKPOINT"

# %% [markdown]
# ## Import it and publish it as an anchor

# %% language="bash"
# set -e
# flexolmo import-hf "$HF_CHECKPOINT" imported
# flexolmo publish imported --public text/public.jsonl --seq-len 256 --out anchor

# %% [markdown]
# ## An owner trains an expert against it; the coordinator merges and exports

# %% language="bash"
# set -e
# flexolmo contribute --anchor anchor --documents text/legal.jsonl --name legal --out legal \
#   --set train.steps=$STEPS --set data.batch_size=8 --set optim.lr=1e-2
# flexolmo merge --anchor anchor legal --out merged
# flexolmo export-hf merged merged-hf --drop-bias

# %% [markdown]
# ## The anchor inside the merged model is the imported one, bit for bit

# %%
import json
from pathlib import Path

import numpy as np

import flexolmo_jax

imported, merged = flexolmo_jax.load("imported"), flexolmo_jax.load("merged")
prompt = "Permission is hereby granted, free of charge, to any person"
ids = np.array([merged.tokenizer.encode(prompt)])


def anchors(model, name):
    return np.asarray(model.params["experts"][name])[:, 0]


same = all(
    np.array_equal(
        anchors(imported, name).astype(anchors(merged, name).dtype), anchors(merged, name)
    )
    for name in ("gate", "up", "down")
)
architectures = json.loads(Path("merged-hf/config.json").read_text())["architectures"]
print("experts:", merged.experts)
print("anchor unchanged:", same, "| architecture:", architectures)
print("logits of the merged model:", merged.logits(ids).shape)
assert same and merged.experts == ("anchor", "legal")
