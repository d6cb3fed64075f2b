#!/bin/sh
# Trains the adapter for SmolLM2-135M-Instruct: stage I, then stage II with the evidence term, then
# the choice of the heads that score. ACRE_DATA: folder of books.train, nq_passages.train and
# qmsum.train. Takes OUT, a folder for the runs; a run that was stopped goes on. COMPARE=1 also
# trains a stage II without the evidence term, which the card's tables compare with.
set -eu
: "${ACRE_DATA:?names the folder of the training data}"
out=${1:?expected a folder for the runs}
here=$(dirname "$0")
acre=${ACRE:-acre}
model=${MODEL:-$("${PYTHON:-python}" -c 'from acre.cli import default_model; print(default_model())')}

common="--model $model --window 1024 --stride 1024 --save-every 10 --warmup 6"
books="books.train.jsonl.xz"

$acre train stage1 $common --out "$out/stage1" --data "excerpts:$ACRE_DATA/$books" \
  --length 8192 --batch-tokens 8192 --steps 70 --lr 1e-3

stage2() {
  $acre train stage2 $common --adapter "$out/stage1" --length 2048 6144 --batch-tokens 4096 \
    --lr 7e-4 --seed 3 --context-weight 0.05 \
    --data "hidden:$ACRE_DATA/nq_passages.train.jsonl.xz=0.42" \
    --data "needles:$ACRE_DATA/$books=0.14" --data key_values=0.18 \
    --data "continuation:$ACRE_DATA/$books=0.2" \
    --data "meeting:$ACRE_DATA/qmsum.train.jsonl.xz=0.06" "$@"
}

[ -z "${COMPARE:-}" ] || stage2 --out "$out/plain" --steps 40
# The adapter beside this file is step 200 of this run.
stage2 --out "$out/stage2" --steps 240 --evidence-weight 8 \
  --evidence-heads 18.6 15.7 17.3 15.6 16.2

"${PYTHON:-python}" "$here/../../benchmarks/scoring_heads.py" --model "$model" \
  --adapter "$out/stage2" --tokens 8192 --most 5 --out "$out/scoring.json"
$acre adapter pack "$out/stage2" --model "$model" --scoring "$out/scoring.json" \
  -o "$out/adapter.safetensors"
