#!/usr/bin/env bash
# The whole story on real text, on a CPU: `make demo`. Every step is a command a real coordinator or owner would type.
# Stopped and started again it goes on where it was: a finished step leaves its output, an unfinished run its checkpoints.
#
#   DEMO_SCALE=large   a wider model, more domains, hours instead of minutes
#   DEMO_SCALE=tiny    every step on little text, in two minutes: what CI runs. Its models have learnt too little for the claims to hold
#   DEMO_DIR=demo      where everything goes
set -euo pipefail

OUT=${DEMO_DIR:-demo}
CONFIGS=$(dirname "$0")/../configs/tiny
SCALE=${DEMO_SCALE:-small}
LAYOUT=2 # of what the demo leaves in its folder: raised when this program cannot go on from what an earlier one left
case $SCALE in
  tiny)
    DOMAINS=(code legal) SPARE=() PUBLIC=(public) MAX_MB=1
    ANCHOR_SET=(--set train.steps=60 --set optim.warmup=20) PAIR_SET=(--set train.steps=30 --set optim.warmup=10)
    ;;
  small) DOMAINS=(biomed code legal math) SPARE=(news) PUBLIC=(public) MAX_MB=12 ANCHOR_SET=() PAIR_SET=() ;;
  large)
    DOMAINS=(academic biomed code discussion drama legal math news) SPARE=() PUBLIC=(public public-more) MAX_MB=40
    ANCHOR_SET=(--set model.d_model=256 --set model.n_heads=4 --set model.n_kv_heads=4 --set model.d_ffn=1024 --set train.steps=4000)
    PAIR_SET=(--set train.steps=600)
    ;;
  *) echo "DEMO_SCALE is '$SCALE'; expected tiny, small or large" >&2; exit 2 ;;
esac

MADE_BY="demo of layout $LAYOUT and scale $SCALE"
if [ -n "$(ls -A "$OUT" 2>/dev/null)" ] && [ "$(cat "$OUT/.made-by" 2>/dev/null)" != "$MADE_BY" ]; then
  found=$(cat "$OUT/.made-by" 2>/dev/null || echo "files of no demo, or of an earlier version's")
  echo "'$OUT' holds $found; expected a $MADE_BY: remove '$OUT', or set DEMO_DIR to a new folder" >&2
  exit 2
fi
mkdir -p "$OUT"
printf '%s\n' "$MADE_BY" >"$OUT/.made-by"
export JAX_PLATFORMS=cpu
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # large pages: a training step takes 10 to 17 % less time
ONE_THREAD=--xla_cpu_multi_thread_eigen=false # two owners on two cores get further with one thread each; the control comes last, alone
# One compiled program serves every owner, and a second run of the demo.
JAX_COMPILATION_CACHE_DIR=$(cd "$OUT" && pwd)/.compiled
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

stage() { # stage NAME OUTPUT COMMAND...: runs the command unless its output is there, and keeps the time
  local name=$1 output=$2 start=$SECONDS
  shift 2
  [ -e "$output" ] && return
  printf '\n== %s: %s\n' "$name" "$*" >&2
  "$@"
  printf '%s\t%s\n' "$name" $((SECONDS - start)) >>"$OUT/seconds.tsv"
}

# ---- What everybody can see: public text, a tokenizer trained on public text only, the anchor and its fingerprint ----

# Documents of this machine, for CI where no registry can be reached: the standard library as code, its help texts as public text, and
# the licences of what is installed, cut into paragraphs.
text_of_this_machine() {
  python - "$OUT/fetched" <<'PYTHON'
import json, pathlib, pydoc_data.topics, sys, sysconfig

out, paths = pathlib.Path(sys.argv[1]), {name: pathlib.Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")}
licences = [path for path in sorted(paths["purelib"].rglob("LICEN[CS]E*")) if path.is_file()]
paragraphs = dict.fromkeys(part for path in licences for part in path.read_text("utf-8", "replace").split("\n\n") if len(part) > 120)
texts = {
    "public": list(pydoc_data.topics.topics.values()),
    "code": [path.read_text("utf-8", "replace") for path in sorted(paths["stdlib"].glob("*.py"))[:150]],
    "legal": list(paragraphs)[:2500],
}
out.mkdir(exist_ok=True)
for name, documents in texts.items():
    (out / f"{name}.jsonl").write_text("".join(json.dumps({"text": text[:8000]}) + "\n" for text in documents), "utf-8")
PYTHON
}
fetch_text() {
  local wanted=() domain
  for domain in "${PUBLIC[@]}" "${DOMAINS[@]}"; do wanted+=(--domain "$domain"); done
  flexolmo data fetch "$OUT/fetched" "${wanted[@]}" --max-mb "$MAX_MB" || [ "$SCALE" = tiny ]
  for domain in "${DOMAINS[@]}"; do # mathematics comes from Debian's packages; without them the spare joins in
    if [ ! -s "$OUT/fetched/$domain.jsonl" ] && [ ${#SPARE[@]} -gt 0 ]; then
      flexolmo data fetch "$OUT/fetched" --domain "${SPARE[@]}" --max-mb "$MAX_MB"
    fi
  done
  if [ "$SCALE" = tiny ]; then # whose domains have no spare
    for domain in "${PUBLIC[@]}" "${DOMAINS[@]}"; do if [ ! -s "$OUT/fetched/$domain.jsonl" ]; then text_of_this_machine; fi; done
  fi
  mv "$OUT/fetched" "$OUT/text"
}
stage fetch "$OUT/text" fetch_text
OWNERS=() PUBLIC_TEXT=() # a source that could not be had is left out
for domain in "${DOMAINS[@]}" "${SPARE[@]}"; do if [ -s "$OUT/text/$domain.jsonl" ]; then OWNERS+=("$domain"); fi; done
for domain in "${PUBLIC[@]}"; do if [ -s "$OUT/text/$domain.jsonl" ]; then PUBLIC_TEXT+=("$OUT/text/$domain.jsonl"); fi; done

stage tokenizer "$OUT/tokenizer.json" \
  flexolmo tokenizer train --input "${PUBLIC_TEXT[@]}" --vocab-size 4096 --out "$OUT/tokenizer.json"
stage prepare "$OUT/data/public" \
  flexolmo data prepare --input "${PUBLIC_TEXT[@]}" --tokenizer "$OUT/tokenizer.json" --seq-len 256 --out "$OUT/data/public"
stage anchor "$OUT/runs/anchor/summary.json" \
  flexolmo train "$CONFIGS/anchor.yaml" --set "data.train=[{path: $OUT/data/public}]" "${ANCHOR_SET[@]}" --out "$OUT/runs/anchor"
stage publish "$OUT/anchor" \
  flexolmo publish "$OUT/runs/anchor" --public "${PUBLIC_TEXT[@]}" --out "$OUT/anchor"

# ---- What each owner does alone, on premises: one command. Two of them at a time, and the control beside them ----

owner() { # train an expert on private text, hand over a contribution
  if [ "$1" = control ]; then
    # No owner: the anchor trained on public text for as many more tokens as one expert, to tell "more training" from "new text".
    XLA_FLAGS='' flexolmo train "$CONFIGS/control.yaml" --set "train.init=$OUT/anchor" --set "data.train=[{path: $OUT/data/public}]" \
      "${PAIR_SET[@]}" --out "$OUT/runs/control"
  elif [ ! -e "$OUT/contributions/$1" ]; then
    if [ ! -e "$OUT/keys/$1" ]; then flexolmo keygen "$OUT/keys/$1"; fi # $1.pub is what the coordinator gets
    flexolmo contribute --anchor "$OUT/anchor" --documents "$OUT/text/$1.jsonl" --name "$1" --config "$CONFIGS/pair.yaml" \
      "${PAIR_SET[@]}" --set "pair.owner=$1" --sign-key "$OUT/keys/$1" --out "$OUT/contributions/$1"
  fi
}
owners() {
  local job
  for job in "$@"; do
    while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done # a failed owner ends the demo (set -e)
    XLA_FLAGS=$ONE_THREAD owner "$job" &
  done
  while [ "$(jobs -rp | wc -l)" -gt 0 ]; do wait -n; done
  touch "$OUT/contributions/.done"
}
mkdir -p "$OUT/contributions"
stage experts "$OUT/contributions/.done" owners "${OWNERS[@]}" control

# ---- What the coordinator does: admit, merge without data or training, take one out again ----

merge_all() {
  local name
  for name in "${OWNERS[@]}"; do
    flexolmo verify "$OUT/contributions/$name" --anchor "$OUT/anchor" --trust "$OUT/keys" --public "$OUT/data/public" --admission refuse
  done
  flexolmo merge --anchor "$OUT/anchor" "${OWNERS[@]/#/$OUT/contributions/}" --trust "$OUT/keys" --out "$OUT/merged"
}
stage merge "$OUT/merged" merge_all
LEAVER=${OWNERS[-1]} STAYERS=("${OWNERS[@]::${#OWNERS[@]}-1}")
leave() {
  flexolmo opt-out "$OUT/merged" --expert "$LEAVER" --out "$OUT/merged-$LEAVER"
  flexolmo verify-receipt "$OUT/merged-$LEAVER/receipt.json" "$OUT/merged-$LEAVER"
}
stage opt-out "$OUT/merged-$LEAVER" leave
stage never-merged "$OUT/never-$LEAVER" \
  flexolmo merge --anchor "$OUT/anchor" "${STAYERS[@]/#/$OUT/contributions/}" --out "$OUT/never-$LEAVER"

# ---- Does it work? One table, results.json, report.html; and a sample with and without the leaver's expert ----

stage evaluate "$OUT/results.json" python "$(dirname "$0")/demo_results.py" "$OUT" "${OWNERS[@]}"
cat "$OUT/results.txt"
if [ "$SCALE" = tiny ]; then echo "Of this scale only the last claim is expected to hold: its models have learnt too little for the others"; fi
