#!/usr/bin/env bash
# Build mamba-ssm and causal-conv1d for sm_90 alone, from their sdists, for measurements beside them.
#   benchmarks/peers/build.sh SDIST_FOLDER WHEEL_FOLDER
# The sdists come from `pip download --no-deps --no-binary :all: mamba-ssm causal-conv1d` on a CUDA host.
set -euo pipefail
sdists=$(realpath "$1")
mkdir -p "$2"
wheels=$(realpath "$2")
work=$(mktemp -d)
export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-8}
for archive in "$sdists"/*.tar.gz; do
    (
        folder="$work/$(basename "$archive" .tar.gz)"
        tar xzf "$archive" -C "$work"
        sed -i 's/+ cc_flag/+ ["-gencode", "arch=compute_90,code=sm_90"]/' "$folder/setup.py"
        python3 -m pip wheel --quiet --no-deps --no-build-isolation --no-index -w "$wheels" "$folder"
    ) &
done
wait
ls "$wheels"
