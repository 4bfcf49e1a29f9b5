#!/usr/bin/env bash
# Runs the kernel under the four tools of compute-sanitizer: every path with every dtype, and random
# launches on several streams.
#
#   ffi/tools/sanitize.sh [build folder]
#
# Needs compute-sanitizer, nvcc and a GPU; run_kernel and stress_kernel are compiled unless the build
# folder holds them. First each tool must find a fault of its kind in a kernel that has it. As many cases run at once as three quarters of the processors can
# take, or JAX_TOPK_SANITIZE_JOBS of them. Prints the cases that are not clean and a summary; exits with 1 if there are any.
set -euo pipefail
cd "$(dirname "$0")/../.."
build=${1:-$(mktemp -d)}
arch=${JAX_TOPK_SANITIZE_ARCH:-90a}
jobs=${JAX_TOPK_SANITIZE_JOBS:-$((($(nproc) * 3 + 3) / 4))}

build_tool() {
  [[ -x $build/$1 ]] && return
  nvcc -std=c++17 -O3 -lineinfo --threads=4 -gencode "arch=compute_${arch},code=sm_${arch}" \
    -I ffi -o "$build/$1" "ffi/tools/$1.cu" ffi/cuda/*.cu ffi/plan.cc
}
# One fault for each tool.
cat >"$build/faults.cu" <<'CUDA'
#include <cstdlib>
__global__ void Memcheck(int* p) { p[1 << 24] = 1; }
__global__ void Racecheck(int* p) {
  __shared__ int x[64];
  x[threadIdx.x] = p[threadIdx.x];
  p[threadIdx.x] = x[63 - threadIdx.x];
}
// Half of a warp waits for lanes that do not include its own.
__global__ void Synccheck(int* p) {
  if (threadIdx.x % 32 >= 16) {
    p[threadIdx.x] = 1;
    __syncwarp(0xffffu);
  }
}
__global__ void Initcheck(int* p) { p[threadIdx.x] = p[threadIdx.x + 64]; }
int main(int, char** argv) {
  int* p;
  if (cudaMalloc(&p, 128 * sizeof(int)) != cudaSuccess) return 1;
  if (argv[1][0] != 'i') cudaMemset(p, 0, 128 * sizeof(int));
  if (argv[1][0] == 'm') Memcheck<<<1, 64>>>(p);
  if (argv[1][0] == 'r') Racecheck<<<1, 64>>>(p);
  if (argv[1][0] == 's') Synccheck<<<1, 64>>>(p);
  if (argv[1][0] == 'i') Initcheck<<<1, 64>>>(p);
  cudaDeviceSynchronize();
}
CUDA
nvcc -std=c++17 -gencode "arch=compute_${arch},code=sm_${arch}" -o "$build/faults" "$build/faults.cu" &
pids=($!)
build_tool run_kernel &
pids+=($!)
build_tool stress_kernel
for pid in "${pids[@]}"; do wait "$pid"; done

num_blind=0
for tool in memcheck racecheck synccheck initcheck; do
  status=0
  compute-sanitizer --tool "$tool" --error-exitcode 3 "$build/faults" "$tool" >"$build/$tool.log" 2>&1 ||
    status=$?
  if ((status != 3)); then
    num_blind=$((num_blind + 1))
    printf 'BLIND: %s ends with status %d on a kernel with a fault of its kind\n' "$tool" "$status"
    head -n 20 "$build/$tool.log"
  fi
done

# Every path, each with every dtype: what it is meant to reach is said behind it. Small lists reach
# the fallbacks with few elements, which keeps the tools fast.
paths=(
  "--rows 3 --width 2100 --k 2048 --length 1500 --values"                        # copy
  "--rows 3 --width 2100 --k 2048 --length 1500 --sorted --values"               # sort only
  "--rows 3 --width 2100 --k 64 --length 1500 --dist few"                        # short, ties
  "--rows 2 --width 4999 --k 2048 --dist clust --values"                         # short, refined
  "--rows 2 --width 10240 --k 512 --sorted --values"                             # short, sorted
  "--rows 2 --width 9001 --k 300 --plan path=short,cluster=1 --smallest"         # short, forced
  "--rows 2 --width 15000 --k 2048 --plan cluster=1 --values"                    # large tile
  "--rows 2 --width 9000 --k 4000 --sorted --values --dist relu"                 # many pairs, apart
  "--rows 2 --width 20003 --k 2048"                                              # resident cluster
  "--rows 2 --width 20003 --k 700 --plan path=sample,cluster=8 --sorted --values" # sample, sorted
  "--rows 2 --width 20000 --k 256 --dist period --plan path=exact"               # exact, sums
  "--rows 2 --width 20000 --k 256 --plan path=exact,cluster=1 --values"          # exact, alone
  "--rows 2 --width 20000 --k 500 --dist equal --smallest"                       # plateau
  "--rows 2 --width 16000 --k 300 --plan candidates=4,path=sample"               # overflow
  "--rows 2 --width 30000 --k 300 --plan cluster=2 --dist sorted --sorted --values" # streamed
  "--rows 2 --width 30000 --k 2000 --plan cluster=1,candidates=64 --dist relu"   # streamed plateau
  "--rows 2 --width 30000 --k 300 --plan cluster=1,stages=2 --dist bits"         # two stages
)
commands=()
for tool in memcheck racecheck synccheck initcheck; do
  for path in "${paths[@]}"; do
    for dtype in float32 bfloat16 float16; do
      commands+=("$tool $build/run_kernel $path --dtype $dtype")
    done
  done
done
for tool in memcheck synccheck; do
  commands+=("$tool $build/stress_kernel --launches 120 --busy 0 --replays 8 --streams 4 --cases 24 \
--timeout 300")
done

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export logs
# One command: its number, then the tool and what runs under it. Leaves a log only if not clean.
run_one() {
  local number=$1 tool=$2 options=()
  shift 2
  # Its own count is of instructions that initialise barriers, and one of ours initialises six. With
  # 16 its table overflows all the same; 4096 is enough, though its help says "per block".
  if [[ $tool == synccheck ]]; then options=(--num-cuda-barriers 4096); fi
  if ! compute-sanitizer --tool "$tool" "${options[@]}" --error-exitcode 3 "$@" \
    >"$logs/$number.running" 2>&1; then
    { printf 'NOT CLEAN: %s: %s\n' "$tool" "${*##*/}"; head -n 20 "$logs/$number.running"; } \
      >"$logs/$number.failed"
  fi
  rm "$logs/$number.running"
}
export -f run_one

begin=$SECONDS
for i in "${!commands[@]}"; do printf '%s %s\n' "$i" "${commands[i]}"; done |
  xargs -P "$jobs" -L 1 bash -c 'run_one "$@"' run_one
failed=("$logs"/*.failed)
[[ -e ${failed[0]} ]] || failed=()
for file in "${failed[@]}"; do cat "$file"; done
printf 'compute-sanitizer: %d runs (%d paths x 3 dtypes x 4 tools, 2 of random launches) in %d s, %s\n' \
  "${#commands[@]}" "${#paths[@]}" $((SECONDS - begin)) \
  "${#failed[@]} not clean, $num_blind tools blind"
((${#failed[@]} + num_blind == 0))
