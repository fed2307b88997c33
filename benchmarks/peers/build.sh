#!/usr/bin/env bash
# Build mamba-ssm and causal-conv1d for sm_90 alone, from their sdists, for measurements beside them.
#   benchmarks/peers/build.sh SDIST_FOLDER TARGET_FOLDER [SECONDS]
# They are installed into TARGET_FOLDER, for PYTHONPATH, side by side and each within SECONDS (default 300);
# what does not build is left out, and the end of its log is shown. Without their backward kernels, which are
# most of the work and are not measured here. On a CUDA host, without the network. The sdists come from
#   MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-binary :all: \
#       --no-build-isolation --dest SDIST_FOLDER mamba-ssm causal-conv1d
# which reads their metadata only, and needs torch, but no CUDA.
set -euo pipefail
shopt -s nullglob
sdists=$(realpath "$1")
mkdir -p "$2"
target=$(realpath "$2")
seconds=${3:-300}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export MAMBA_FORCE_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE MAX_JOBS=${MAX_JOBS:-16} NVCC_APPEND_FLAGS=
unset TORCH_CUDA_ARCH_LIST

build() {
    local folder=$1
    # their lists name up to nine architectures; with one, nvcc's own threads are of no use either
    sed -i 's/+ cc_flag/+ ["-gencode", "arch=compute_90,code=sm_90"]/; s/"--threads", "4"/"--threads", "1"/' \
        "$folder/setup.py"
    grep -q 'compute_90,code=sm_90"\]' "$folder/setup.py" || { echo "setup.py has no cc_flag"; return 1; }
    sed -i '/csrc\/.*_bwd.*\.cu"/d' "$folder/setup.py"
    sed -i 's/\(_bwd_cuda(.*cudaStream_t stream)\);/\1 { AT_ERROR("built without gradients"); }/' \
        "$folder"/csrc/*.cpp "$folder"/csrc/*/*.cpp
    # not by pip, which would import torch three times
    (cd "$folder" && timeout "$seconds" python3 setup.py --quiet build_ext --inplace)
}

for archive in "$sdists"/*.tar.gz; do
    name=$(basename "$archive" .tar.gz)
    tar xzf "$archive" -C "$work"
    (
        began=$SECONDS
        if build "$work/$name" >"$work/$name.log" 2>&1; then
            cp -r "$work/$name"/{*.so,*.egg-info,mamba_ssm,causal_conv1d} "$target/" 2>/dev/null || true
            echo "$name: built in $((SECONDS - began)) s"
        else
            echo "$name: not built after $((SECONDS - began)) s; the end of its log:"
            tail -n 25 "$work/$name.log"
        fi
    ) &
done
wait
ls "$target"
