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
# A dense checkpoint of an OLMo, Llama, Mistral or Qwen can be an anchor: import it, publish it, let
# an owner train an expert against it, merge, and go back to Hugging Face's format. Set
# `HF_CHECKPOINT` to a directory with `config.json`, `*.safetensors` and `tokenizer.json`
# (`hf download allenai/OLMo-2-0425-1B --local-dir olmo2`). An expert of the 1B takes 16.7 GiB as
# compiled for a TPU: a v6e holds it (31.2 GiB), a v5e does not (15.8). Without a checkpoint a small
# model is trained and exported first, so that the notebook runs anywhere.

# %%
import os

checkpoint = os.environ.setdefault("HF_CHECKPOINT", "olmo2")
if os.path.exists(os.path.join(checkpoint, "model.safetensors.index.json")):  # large
    size = dict(STEPS=500, SAVE_EVERY=100, LR=4e-4, COMPUTE="bfloat16")
else:
    size = dict(STEPS=40, SAVE_EVERY=20, LR=1e-2, COMPUTE="float32")
if accelerator == "cuda":
    size["COMPUTE"] = "float32"  # a T4 has no bfloat16
os.environ |= {name: str(value) for name, value in size.items()}
print(size)

# %% [markdown]
# ## Public and private text, and a checkpoint where there is none

# %% language="bash"
# set -e
# flexolmo data fetch text --domain public --domain legal --max-mb 0.5
# if [ ! -e "$HF_CHECKPOINT" ]; then
#   [ -e tokenizer.json ] || flexolmo tokenizer train --input text/public.jsonl \
#     --vocab-size 1024 --out tokenizer.json
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
# [ -e imported ] || flexolmo import-hf "$HF_CHECKPOINT" imported
# [ -e anchor ] || flexolmo publish imported --public text/public.jsonl --seq-len 256 --out anchor

# %% [markdown]
# ## An owner trains an expert against it; the coordinator merges and exports

# %% language="bash"
# set -e
# [ -e legal ] || flexolmo contribute --anchor anchor --documents text/legal.jsonl --name legal \
#   --out legal --set train.steps=$STEPS --set train.save_every=$SAVE_EVERY \
#   --set train.compute_dtype=$COMPUTE --set train.remat=full \
#   --set data.batch_size=8 --set optim.lr=$LR
# [ -e merged ] || flexolmo merge --anchor anchor legal --out merged
# [ -e merged-hf ] || flexolmo export-hf merged merged-hf --drop-bias
# ls merged-hf

# %% [markdown]
# ## The anchor inside the merged model is the imported one, bit for bit
#
# `verify` recomputes the digest of every array of the model and compares them with the anchor's.

# %% language="bash"
# set -e
# flexolmo verify merged --anchor anchor
# flexolmo generate merged --prompt "Permission is hereby granted, free of charge" \
#   --max-new-tokens 24
