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
# # FlexOlmo in ten commands
#
# Two owners who share no data build one language model: a public **anchor** is trained and frozen,
# each owner trains one **expert** against it, the experts are **merged** without data, and one of
# them **opts out** again, exactly. Every cell is what a real coordinator or owner would type. On a
# CPU it is small and takes a minute or two; on a Colab TPU the same cells train a larger model on
# more text.

# %%
import importlib.util
import os
import sys

if importlib.util.find_spec("flexolmo_jax") is None:
    # !pip install -q flexolmo-jax
    pass
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

# %% [markdown]
# ## Which device, and how large

# %%
import jax

on_cpu = jax.default_backend() == "cpu"
print(jax.devices())
size = (
    dict(MB=0.5, VOCAB=1024, STEPS=120, EXPERT_STEPS=60, D=64, LAYERS=2)
    if on_cpu
    else dict(MB=12, VOCAB=8192, STEPS=3000, EXPERT_STEPS=800, D=512, LAYERS=8)
)
os.environ |= {name: str(value) for name, value in size.items()} | {
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
}
if not on_cpu:  # the commands below need the device that this process would hold
    jax.clear_caches()
    jax.extend.backend.clear_backends()

# %% [markdown]
# ## What everybody can see: public text, a tokenizer, the anchor

# %% language="bash"
# set -e
# flexolmo data fetch text --domain public --domain code --domain legal --max-mb $MB
# flexolmo tokenizer train --input text/public.jsonl --vocab-size $VOCAB --out tokenizer.json

# %% language="bash"
# set -e
# cat > anchor.yaml <<EOF
# run: anchor
# model:
#   {preset: tiny, d_model: $D, n_layers: $LAYERS, n_heads: 4, n_kv_heads: 4, d_ffn: $((4 * D)),
#    init_std: 0.1}
# data: {train: [{path: text/public.jsonl}], tokenizer: tokenizer.json, batch_size: 8, seq_len: 256}
# train: {steps: $STEPS}
# optim: {lr: 8.0e-3, warmup: 20}
# EOF
# flexolmo train anchor.yaml --out anchor-run
# flexolmo publish anchor-run --public text/public.jsonl --out anchor

# %% [markdown]
# ## What each owner does alone, on premises

# %% language="bash"
# set -e
# for owner in code legal; do
#   flexolmo contribute --anchor anchor --documents text/$owner.jsonl --name $owner \
#     --out contributions/$owner --set train.steps=$EXPERT_STEPS --set data.batch_size=8 \
#     --set optim.lr=1e-2 --set pair.contrast=1.0
# done

# %% [markdown]
# ## What the coordinator does: merge without data, evaluate, take one out again

# %% language="bash"
# set -e
# flexolmo merge --anchor anchor contributions/code contributions/legal --out merged
# flexolmo opt-out merged --expert legal --out merged-without-legal > receipt.txt
# for model in anchor merged merged-without-legal; do
#   flexolmo eval $model --data text/code.jsonl text/legal.jsonl --limit 16 --json > $model.json
# done

# %% [markdown]
# Bits per byte on held-out text, lower is better: merged is better than the anchor on both domains;
# without the legal expert its gain is gone, and code is as it was.

# %%
import json
from pathlib import Path

bits = {
    model: json.loads(Path(f"{model}.json").read_text())["bits_per_byte"]
    for model in ("anchor", "merged", "merged-without-legal")
}
print(f"{'':24}{'code':>8}{'legal':>8}")
for model, figures in bits.items():
    print(f"{model:24}{figures['code']:8.3f}{figures['legal']:8.3f}")
assert all(bits["merged"][data] < bits["anchor"][data] for data in ("code", "legal"))
assert bits["merged-without-legal"]["legal"] > bits["merged"]["legal"]

# %% [markdown]
# ## Use it: generate with an expert switched off, and hand it to Hugging Face's transformers

# %%
import flexolmo_jax

model = flexolmo_jax.load("merged")
for without in ([], ["legal"]):
    print(
        f"without {without}:",
        model.generate(["Permission is hereby granted"], 24, without=without)[0],
    )

# %% language="bash"
# set -e
# flexolmo export-hf merged merged-hf --drop-bias
# ls merged-hf
