#!/bin/sh
# Trains an adapter for SmolLM2-135M-Instruct: stage I, then stage II twice, the second time with
# the heads that were found best after the first. ACRE_DATA: folder of books.train, nq_passages.train
# and qmsum.train. Takes OUT, a folder for the runs; a run that was stopped goes on.
set -eu
: "${ACRE_DATA:?names the folder of the training data}"
out=${1:?expected a folder for the runs}
here=$(dirname "$0")
acre=${ACRE:-acre}
model=${MODEL:-$("${PYTHON:-python}" -c 'from acre.cli import default_model; print(default_model())')}

common="--model $model --window 1024 --stride 1024 --batch-tokens 8192 --save-every 10"
books="books.train.jsonl.xz"

$acre train stage1 $common --out "$out/stage1" --data "excerpts:$ACRE_DATA/$books" \
  --length 8192 --steps 280 --lr 1e-3 --warmup 10

stage2() {
  $acre train stage2 $common --length 2048 12288 --evidence-weight 8 --warmup 6 "$@"
}

stage2 --adapter "$out/stage1" --out "$out/stage2" --steps 230 --lr 7e-4 --seed 3 \
  --evidence-heads 18.6 15.6 6.8 2.4 15.7 \
  --data "hidden:$ACRE_DATA/nq_passages.train.jsonl.xz=0.45" \
  --data "needles:$ACRE_DATA/$books=0.17" --data key_values=0.1 \
  --data "continuation:$ACRE_DATA/$books=0.2" --data "meeting:$ACRE_DATA/qmsum.train.jsonl.xz=0.08"

stage2 --adapter "$out/stage2" --out "$out/stage2-more" --steps 170 --lr 5e-4 --seed 4 \
  --context-weight 0.05 \
  --evidence-heads 18.6 18.7 15.6 15.7 17.3 \
  --data "hidden:$ACRE_DATA/nq_passages.train.jsonl.xz=0.42" \
  --data "needles:$ACRE_DATA/$books=0.12" --data key_values=0.2 \
  --data "continuation:$ACRE_DATA/$books=0.2" --data "meeting:$ACRE_DATA/qmsum.train.jsonl.xz=0.06"

"${PYTHON:-python}" "$here/../../benchmarks/scoring_heads.py" --model "$model" \
  --adapter "$out/stage2-more" --tokens 8192 --most 5 --out "$out/scoring.json"
$acre adapter pack "$out/stage2-more" --model "$model" --scoring "$out/scoring.json" \
  -o "$out/adapter.safetensors"
