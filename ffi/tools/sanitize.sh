#!/usr/bin/env bash
# Runs the kernel under the four tools of compute-sanitizer, on small cases that reach every path.
#
#   ffi/tools/sanitize.sh [build folder]
#
# Needs nvcc, compute-sanitizer and a GPU. Prints one line per tool and case that is not clean, and a
# summary; exits with 1 if anything is not clean.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-$(mktemp -d)}
arch=${JAX_TOPK_SANITIZE_ARCH:-90a}
nvcc -std=c++17 -O3 -lineinfo -gencode "arch=compute_${arch},code=sm_${arch}" -I ffi \
  -o "$build/run_kernel" ffi/tools/run_kernel.cu ffi/cuda/launch.cu ffi/cuda/timing.cu ffi/plan.cc

cases=(
  "--rows 3 --width 2100 --k 2048 --length 1500"                                # copy
  "--rows 3 --width 2100 --k 64 --length 1500 --dist few"                       # short, ties
  "--rows 2 --width 4999 --k 2048 --dist clust --values"                        # short, refined
  "--rows 2 --width 10240 --k 512 --dtype bfloat16 --sorted --values"           # short, sorted
  "--rows 2 --width 20003 --k 2048 --dist normal"                               # resident cluster
  "--rows 2 --width 20000 --k 256 --dist period --plan path=exact"              # exact, cluster sums
  "--rows 2 --width 20000 --k 500 --dist equal --smallest"                      # plateau
  "--rows 2 --width 16000 --k 300 --plan candidates=4,path=sample --dtype float16"  # overflow
  "--rows 2 --width 30000 --k 300 --plan cluster=2 --dist sorted --sorted --values"  # streamed
  "--rows 2 --width 30000 --k 2000 --plan cluster=1,candidates=64 --dist relu"  # streamed plateau
)
not_clean=0
for tool in memcheck racecheck synccheck initcheck; do
  for case in "${cases[@]}"; do
    # shellcheck disable=SC2086
    if ! log=$(compute-sanitizer --tool "$tool" --error-exitcode 3 "$build/run_kernel" $case 2>&1); then
      not_clean=$((not_clean + 1))
      printf 'NOT CLEAN: %s: %s\n%s\n' "$tool" "$case" "$(printf '%s\n' "$log" | head -n 20)"
    fi
  done
  echo "$tool: ${#cases[@]} cases run"
done
echo "compute-sanitizer: $not_clean runs not clean"
[ "$not_clean" -eq 0 ]
