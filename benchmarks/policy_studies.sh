#!/bin/sh
# Every simulated study of the policy: benchmarks/policy_studies.sh TRACES
# TRACES is a folder with servegen_deepseek_r1.csv, azure_llm_2023_conv.csv and mooncake_conversation.jsonl.
set -eu
traces=$1
here=$(dirname "$0")
results=$(mktemp -d) # not the checkout: results name a commit, and a changed file would make it an unclean one
trap 'rm -rf "$results"' EXIT
compared="--preset static-rr --preset static-least-loaded --preset paper --preset llumnix --preset balanceroute \
  --preset pausing --preset past-future --preset ares"

sweep() { # NAME INSTANCES PROFILE TRACE REQUESTS SEEDS LOADS OPTIONS...
  name=$1 decode=$2 profile=$3 trace=$4 requests=$5 seeds=$6 loads=$7
  shift 7
  ares simulate sweep --decode "$decode" --prefill "$((decode / 2))" --profile "$profile" --trace "$trace" \
    --requests "$requests" --seeds "$seeds" --loads "$loads" --period 2 --json "$results/$name.json" "$@"
}

all=0.5,0.7,0.9,1.0,1.2,1.5
# shellcheck disable=SC2086 - the presets are several words
{
  sweep sweep-paper-24gb-4 4 r1-qwen-7b-24gb paper 1000 3 $all $compared --plot "$results/sweep-paper-24gb-4.svg"
  sweep sweep-paper-24gb-8 8 r1-qwen-7b-24gb paper 2000 2 $all $compared
  sweep sweep-paper-80gb-4 4 r1-qwen-7b-80gb paper 2000 2 $all $compared
  sweep sweep-paper-80gb-8 8 r1-qwen-7b-80gb paper 4000 1 0.5,0.9,1.0,1.2,1.5 $compared
  sweep sweep-servegen-24gb-4 4 r1-qwen-7b-24gb "$traces/servegen_deepseek_r1.csv" 3000 1 $all $compared
}
short="--preset static-rr --preset static-least-loaded --preset ares"
# shellcheck disable=SC2086 - likewise
{
  sweep azure-80gb-4 4 r1-qwen-7b-80gb "$traces/azure_llm_2023_conv.csv" 4000 1 0.5,0.8,1.0 $short
  sweep mooncake-80gb-4 4 r1-qwen-7b-80gb "$traces/mooncake_conversation.jsonl" 4000 1 0.5,0.8,1.0 $short
}
few=0.9,1.0,1.2
sweep ablation-parts 4 r1-qwen-7b-24gb paper 1500 3 $few --preset static-least-loaded --preset ares-no-prediction \
  --preset paper --preset ares-rebalance --preset ares-admission --preset ares-suspension --preset ares \
  --preset ares-oracle
for error in exact noise-30 noise-60 noise-100 residual-life; do
  sweep "ablation-error-$error" 4 r1-qwen-7b-24gb paper 1500 3 $few --preset ares --predictor "$error"
done
known() { # NAME PREDICTOR
  sweep "load-curve-$1" 4 r1-qwen-7b-24gb paper 1500 3 $all --preset ares --predictor "$2"
  sweep "load-curve-servegen-$1" 4 r1-qwen-7b-24gb "$traces/servegen_deepseek_r1.csv" 3000 3 $all --preset ares --predictor "$2"
}
for error in residual-life length-curves exact; do
  known "$error" "$error"
done
known trained "$here/results/predictor-qwen-open.json"
# shellcheck disable=SC2086 - likewise
for gap in 2 30 60 120 300 none; do
  sweep "gap-$gap" 4 r1-qwen-7b-24gb paper 1000 3 $few $short --slo-gap "$gap"
done
for decode in 8 32 64 128 256; do
  # shellcheck disable=SC2086 - likewise
  ares simulate --trace paper --requests "$((decode * 250))" --decode "$decode" --prefill "$((decode / 2))" \
    --profile r1-qwen-7b-24gb --load 1.0 --period 2 $short --json "$results/scale-$decode.json"
done
mv "$results"/*.svg "$here/../docs/images"
mv "$results"/*.json "$here/results"
python "$here/policy_tables.py"
