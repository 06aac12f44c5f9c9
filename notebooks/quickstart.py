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
# Run all cells. On a Colab TPU or GPU the anchor is SmolLM2-135M, a real small model, and two
# owners bring news and definitions of biology. On a CPU a small anchor is trained first, which
# takes a few minutes. If Colab takes the machine back, run all cells again: what is in Google Drive
# stays, and training goes on from its last checkpoint.

# %% [markdown]
# ## How large
#
# Computed from what the TPU's compiler says (benchmarks/colab.py), not measured, if a chip reaches
# 30 % of its peak: on a v5e each of the two experts takes 9.4 of 15.8 GiB and a minute; a v6e is
# faster. A T4 has no bfloat16: in float32 each takes 4.7 of its 15 GiB and 3 minutes. Downloads,
# compiling and evaluating come on top: about five minutes more.
#
# Of the host's memory all cells hold 0.8 GB at most on a CPU (measured, with the small anchor).

# %%
import os

SIZES = {
    "": dict(
        OPEN="", OWNERS="code legal", PROMPT="Permission is hereby granted", MB=0.5, SEQ=256,
        BATCH=8, COMPUTE="float32", STEPS=120, EXPERT_STEPS=60, SAVE_EVERY=60, EXPERT_LR=1e-2,
        ROUTER_LR=0,
    ),
    "tpu": dict(
        OPEN="smollm2-135m", OWNERS="news biomed", PROMPT="The company said", MB=5, SEQ=512,
        BATCH=16, COMPUTE="bfloat16", STEPS=0, EXPERT_STEPS=300, SAVE_EVERY=100, EXPERT_LR=5e-4,
        ROUTER_LR=5e-3,
    ),
    "cuda": dict(
        OPEN="smollm2-135m", OWNERS="news biomed", PROMPT="The company said", MB=2, SEQ=512,
        BATCH=4, COMPUTE="float32", STEPS=0, EXPERT_STEPS=200, SAVE_EVERY=50, EXPERT_LR=5e-4,
        ROUTER_LR=5e-3,
    ),
}  # fmt: skip
size = SIZES[accelerator]
os.environ |= {name: str(value) for name, value in size.items()}
print(size)

# %% [markdown]
# ## What everybody can see: public text and the anchor
#
# `anchor fetch` gets an open model and publishes an anchor of it. Another one comes from Hugging
# Face's hub: `flexolmo import-hf org/name start`, then `flexolmo publish start --public ...`.
# Without an accelerator an anchor is trained from nothing. A step whose result is there already is
# left out.

# %% language="bash"
# set -e
# flexolmo data fetch text --domain public $(printf -- '--domain %s ' $OWNERS) --max-mb $MB
# if [ "$OPEN" ]; then
#   [ -e anchor ] || flexolmo anchor fetch $OPEN anchor --seq-len $SEQ
#   exit
# fi
# [ -e tokenizer.json ] || flexolmo tokenizer train --input text/public.jsonl --vocab-size 1024 \
#   --out tokenizer.json
# cat > anchor.yaml <<EOF
# run: anchor
# model:
#   {preset: tiny, d_model: 64, n_layers: 2, n_heads: 4, n_kv_heads: 4, d_ffn: 256,
#    max_seq_len: $SEQ, init_std: 0.1}
# data:
#   {train: [{path: text/public.jsonl}], tokenizer: tokenizer.json, batch_size: $BATCH,
#    seq_len: $SEQ}
# train: {steps: $STEPS, save_every: $SAVE_EVERY}
# optim: {lr: 8e-3, warmup: $((STEPS / 6))}
# EOF
# flexolmo train anchor.yaml --out anchor-run
# [ -e anchor ] || flexolmo publish anchor-run --public text/public.jsonl --out anchor

# %% [markdown]
# ## What each owner does alone, on premises

# %% language="bash"
# set -e
# for owner in $OWNERS; do
#   [ -e contributions/$owner ] || flexolmo contribute --anchor anchor \
#     --documents text/$owner.jsonl --name $owner --out contributions/$owner \
#     --set train.steps=$EXPERT_STEPS --set train.save_every=$SAVE_EVERY \
#     --set train.compute_dtype=$COMPUTE --set data.batch_size=$BATCH \
#     --set optim.lr=$EXPERT_LR --set optim.router_lr=$ROUTER_LR --set pair.contrast=1.0
# done

# %% [markdown]
# ## What the coordinator does: merge without data, evaluate, take one out again

# %% language="bash"
# set -e
# read -r first second <<< "$OWNERS"
# [ -e merged ] || flexolmo merge --anchor anchor contributions/$first contributions/$second \
#   --out merged
# [ -e without ] || flexolmo opt-out merged --expert $second --out without
# for model in anchor merged without; do
#   flexolmo eval $model --data text/$first.jsonl text/$second.jsonl --limit 16 --json > $model.json
# done

# %% [markdown]
# Bits per byte on held-out text, lower is better: merged is better than the anchor on both domains;
# without the second owner's expert its gain is gone, and the first owner's text is as it was.

# %%
import json
from pathlib import Path

first, second = size["OWNERS"].split()
bits = {
    model: json.loads(Path(f"{model}.json").read_text())["bits_per_byte"]
    for model in ("anchor", "merged", "without")
}
print(f"{'':10}{first:>8}{second:>8}")
for model, figures in bits.items():
    print(f"{model:10}{figures[first]:8.3f}{figures[second]:8.3f}")
assert all(bits["merged"][data] < bits["anchor"][data] for data in (first, second))
assert bits["without"][second] > bits["merged"][second]

# %% [markdown]
# ## Use it: generate with an expert switched off, and hand it to Hugging Face's transformers

# %% language="bash"
# set -e
# flexolmo generate merged --prompt "$PROMPT" --max-new-tokens 24
# flexolmo generate merged --prompt "$PROMPT" --max-new-tokens 24 --without ${OWNERS#* }
# [ -e merged-hf ] || flexolmo export-hf merged merged-hf --drop-bias
# ls merged-hf
