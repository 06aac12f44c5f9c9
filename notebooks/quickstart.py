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
# them **opts out** again, exactly. Every cell is what a real coordinator or owner would type.
#
# Run all cells. On a CPU the model is small and it takes a few minutes. On a Colab TPU or GPU the
# same cells train 42 million parameters on more text. If Colab takes the machine back, run all
# cells again: what is in Google Drive stays, and training goes on from its last checkpoint.

# %% [markdown]
# ## How large
#
# Computed from what the TPU's compiler says (benchmarks/colab.py), not measured, if a chip reaches
# 30 % of its peak: on a v5e the anchor takes 6.9 of 15.8 GiB and 2 minutes, each of two experts 6.5
# GiB and 1 minute; a v6e is faster. A T4 has no bfloat16: in float32 the anchor takes 9 of its 15
# GiB and 13 minutes, each expert 7 minutes.

# %%
import os

SIZES = {
    "": dict(
        MB=0.5, VOCAB=1024, D=64, LAYERS=2, HEADS=4, SEQ=256, BATCH=8, COMPUTE="float32",
        STEPS=120, EXPERT_STEPS=60, SAVE_EVERY=60, LR=8e-3, EXPERT_LR=1e-2, INIT_STD=0.1,
    ),
    "tpu": dict(
        MB=20, VOCAB=8192, D=512, LAYERS=8, HEADS=8, SEQ=512, BATCH=32, COMPUTE="bfloat16",
        STEPS=1500, EXPERT_STEPS=400, SAVE_EVERY=250, LR=2e-3, EXPERT_LR=2e-3, INIT_STD=0.04,
    ),
    "cuda": dict(
        MB=20, VOCAB=8192, D=512, LAYERS=8, HEADS=8, SEQ=512, BATCH=32, COMPUTE="float32",
        STEPS=500, EXPERT_STEPS=200, SAVE_EVERY=100, LR=2e-3, EXPERT_LR=2e-3, INIT_STD=0.04,
    ),
}  # fmt: skip
size = SIZES[accelerator]
os.environ |= {name: str(value) for name, value in size.items()}
print(size)

# %% [markdown]
# ## What everybody can see: public text, a tokenizer, the anchor
#
# A step whose result is there already is left out.

# %% language="bash"
# set -e
# flexolmo data fetch text --domain public --domain code --domain legal --max-mb $MB
# [ -e tokenizer.json ] || flexolmo tokenizer train --input text/public.jsonl \
#   --vocab-size $VOCAB --out tokenizer.json

# %% language="bash"
# set -e
# cat > anchor.yaml <<EOF
# run: anchor
# model:
#   {preset: tiny, d_model: $D, n_layers: $LAYERS, n_heads: $HEADS, n_kv_heads: $HEADS,
#    d_ffn: $((4 * D)), max_seq_len: $SEQ, init_std: $INIT_STD}
# data:
#   {train: [{path: text/public.jsonl}], tokenizer: tokenizer.json, batch_size: $BATCH,
#    seq_len: $SEQ}
# train: {steps: $STEPS, save_every: $SAVE_EVERY, compute_dtype: $COMPUTE}
# optim: {lr: $LR, warmup: $((STEPS / 6))}
# EOF
# flexolmo train anchor.yaml --out anchor-run
# [ -e anchor ] || flexolmo publish anchor-run --public text/public.jsonl --out anchor

# %% [markdown]
# ## What each owner does alone, on premises

# %% language="bash"
# set -e
# for owner in code legal; do
#   [ -e contributions/$owner ] || flexolmo contribute --anchor anchor \
#     --documents text/$owner.jsonl --name $owner --out contributions/$owner \
#     --set train.steps=$EXPERT_STEPS --set train.save_every=$SAVE_EVERY \
#     --set train.compute_dtype=$COMPUTE --set data.batch_size=$BATCH \
#     --set optim.lr=$EXPERT_LR --set pair.contrast=1.0
# done

# %% [markdown]
# ## What the coordinator does: merge without data, evaluate, take one out again

# %% language="bash"
# set -e
# [ -e merged ] || flexolmo merge --anchor anchor contributions/code contributions/legal \
#   --out merged
# [ -e without-legal ] || flexolmo opt-out merged --expert legal --out without-legal
# for model in anchor merged without-legal; do
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
    for model in ("anchor", "merged", "without-legal")
}
print(f"{'':16}{'code':>8}{'legal':>8}")
for model, figures in bits.items():
    print(f"{model:16}{figures['code']:8.3f}{figures['legal']:8.3f}")
assert all(bits["merged"][data] < bits["anchor"][data] for data in ("code", "legal"))
assert bits["without-legal"]["legal"] > bits["merged"]["legal"]

# %% [markdown]
# ## Use it: generate with an expert switched off, and hand it to Hugging Face's transformers

# %% language="bash"
# set -e
# prompt="Permission is hereby granted"
# flexolmo generate merged --prompt "$prompt" --max-new-tokens 24
# flexolmo generate merged --prompt "$prompt" --max-new-tokens 24 --without legal
# [ -e merged-hf ] || flexolmo export-hf merged merged-hf --drop-bias
# ls merged-hf
