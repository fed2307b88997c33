#!/usr/bin/env bash
# The experiments of arXiv 2602.21144 with this engine, on the GPUs of one host:
#   benchmarks/published.sh FOLDER [DEGREE...]
# For each model and degree (by default 1 2 4): throughput over context lengths and batches, with the sums between
# ranks as they are and quantised; on several GPUs the same for the requests without P2P, as on a PCIe host, and
# once more with int4 and error feedback; and data-parallel replicas. Then the report, FOLDER/report.md. A run
# that fails leaves what it has measured, and the others go on. BENCHMARK holds more options for every run,
# such as "--benchmark.repeats 1".
set -uo pipefail
folder=$1
shift
degrees=("$@")
[ $# -gt 0 ] || degrees=(1 2 4)
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}

run() { # NAME DEGREE CONFIG OPTION...
    local name=$1 degree=$2 config=$3
    shift 3
    # shellcheck disable=SC2086  # BENCHMARK is words
    torchrun --standalone --nproc-per-node "$degree" infer.py --config "$config" --parallel.tensor "$degree" \
        --benchmark.folder "$folder/$name" "$@" ${BENCHMARK:-} >"$folder/$name.log" 2>&1 ||
        echo "$name has failed, see $folder/$name.log"
}

mkdir -p "$folder"
for model in mamba_2.8b falcon_mamba_7b zamba_7b; do
    config=configs/bench_$model.toml
    preset=${model//_/-}
    requests="64x2048+128 8x16384+128"
    [ "$model" != zamba_7b ] || requests="8x2048+128 4x8192+128"
    for degree in "${degrees[@]}"; do
        run "${model}_tp$degree" "$degree" "$config"
        [ "$degree" -gt 1 ] || continue
        # shellcheck disable=SC2086
        NCCL_P2P_DISABLE=1 run "${model}_tp${degree}_no_p2p" "$degree" "$config" \
            --reduction.algorithm process_group --benchmark.batches --benchmark.cases $requests
        # shellcheck disable=SC2086
        NCCL_P2P_DISABLE=1 run "${model}_tp${degree}_no_p2p_fed_back" "$degree" "$config" \
            --reduction.algorithm process_group --reduction.codec int4 --reduction.feedback true \
            --benchmark.codecs int4 \
            --benchmark.batches --benchmark.cases $requests
        # shellcheck disable=SC2086
        python benchmarks/replicas.py --model "$preset" --replicas "$degree" --cases $requests \
            --out "$folder/${model}_replicas$degree.json" >"$folder/${model}_replicas$degree.log" 2>&1 ||
            echo "${model}_replicas$degree has failed"
    done
done
shopt -s nullglob
python infer.py report --out "$folder" "$folder"/*/report.json "$folder"/*_replicas*.json benchmarks/peers/*.json
