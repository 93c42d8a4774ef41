#!/usr/bin/env bash
# A few minutes on a machine with an NVIDIA GPU: is everything right there, how fast is it, and what to improve next.
#
#     benchmarks/on_gpu.sh                              # all steps in this order, as far as $BUDGET goes
#     benchmarks/on_gpu.sh machine build warpgroups
#     BUDGET=7200 LIMIT=900 benchmarks/on_gpu.sh        # where time does not matter
#     ARCHIVE=$OUT/results.tar.gz OUT=/tmp/results benchmarks/on_gpu.sh   # on a machine that gives back few files
#
#   machine      the card, its clocks as they are, the driver, the compiler, torch
#   build        hrpose with kernels for this card alone, in place
#   tests        tests/test_cuda.py: ops and networks on the card against float64, their references and themselves
#   warpgroups   the same for the bottlenecks of sm_90a; where that fails, later steps do without these kernels
#   bottlenecks  `hrpose bench` of dilation pyramids at 32 x 24: ours for warps and for warpgroups, cuDNN, torch.compile
#   profile      the kernels of dpn4_64 one by one, with bottlenecks for warps and for warpgroups
#   dpn4_64      `hrpose bench` of the network in bfloat16
#   compiled     the kernels of torch.compile's dpn4_64 beside ours
#   op_tests     the `cuda` cases of tests/ops
#   sanitizer    each kernel once under compute-sanitizer
#   ncu          our kernels of dpn4_64 by Nsight Compute ($OUT/ncu-*.log)
#   ops          `hrpose bench` of decode, crop and ram_sum
#   pipeline     `hrpose bench` of the way from an image file to keypoints, with CUDA graphs and without
#   dpn4_32, hrnet_w32, chains
#                `hrpose bench` of these networks, and of bottlenecks of all sizes
#
# All steps together take $BUDGET seconds (540: a lent machine may give a command ten minutes), each at most its own
# number below, or $LIMIT. A step for which less than half of that is left is skipped. One that is stopped keeps what it
# has written: $OUT/<step>.log, tables as $OUT/*.json (OUT: ./gpu-results), all of it after each step in $ARCHIVE too,
# if that is set. A failing step does not keep the others from running, but without a build nothing else runs; the exit
# code is then 1. Where a step cannot run, it says why. $WHEELS may name a folder of wheels (pycocotools, pillow, tqdm),
# for a machine without a network. The card's settings are left as they are found.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-$PWD/gpu-results} PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
BUDGET=${BUDGET:-540}
# 3x3 convolutions by cuDNN alone: tuning Triton's too takes minutes per row. 1x1 are tuned as matrix products anyway.
export TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=${TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS:-ATEN}
# In the order of what they tell. Seconds: room for what has not been seen to take them, to be set after a session.
STEPS="machine build tests warpgroups bottlenecks profile dpn4_64 compiled op_tests sanitizer ncu ops pipeline dpn4_32
  hrnet_w32 chains"
declare -A SECONDS_OF=([machine]=30 [build]=180 [tests]=150 [warpgroups]=60 [bottlenecks]=120 [profile]=60 [dpn4_64]=120
  [compiled]=60 [op_tests]=90 [sanitizer]=120 [ncu]=60 [ops]=90 [pipeline]=60 [dpn4_32]=90 [hrnet_w32]=120 [chains]=300)

have() { command -v "$1" >/dev/null; }

run_machine() {
  nvidia-smi
  local what=name,compute_cap,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu
  nvidia-smi --query-gpu=$what --format=csv
  nvcc --version | tail -n 2
  "$PYTHON" -c 'import sys, torch; print(sys.version); print("torch", torch.__version__, "CUDA", torch.version.cuda)
print("cuDNN", torch.backends.cudnn.version(), torch.cuda.get_device_properties(0))'
}

run_build() {
  if [[ -n ${WHEELS:-} ]]; then
    "$PYTHON" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || return
  fi
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d '. ')
  [[ $arch == 90 ]] && arch=90a
  time HRPOSE_CUDA=1 HRPOSE_CUDA_ARCHS=$arch "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e . || return
  "$PYTHON" -m hrpose doctor
}

# check TESTS...: by several processes where pytest can.
check() {
  "$PYTHON" -c 'import torch; torch.zeros(1).cuda()' || return # or all tests would be skipped, and nothing failed
  local several=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && several=(-n 6)
  "$PYTHON" -m pytest -q -rs "${several[@]}" "$@"
}
run_tests() { check tests/test_cuda.py -k "not warpgroups"; }
run_warpgroups() { check tests/test_cuda.py -k warpgroups; }
run_op_tests() { check tests/ops -k cuda; }

run_sanitizer() {
  have compute-sanitizer || { echo "skipped: there is no compute-sanitizer on PATH"; return 0; }
  local tool failed=0
  for tool in memcheck racecheck synccheck; do
    echo "== $tool"
    # Without torch's cache each tensor is an allocation of its own, whose ends memcheck knows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kns=hrpose --error-exitcode 9 \
      "$PYTHON" -m pytest -q tests/test_cuda.py -k test_once || failed=1
  done
  return $failed
}

# bench NAME "BATCHES" ARGUMENTS...
bench() {
  local name=$1 batches=() n
  for n in $2; do
    batches+=(--batch "$n")
  done
  "$PYTHON" -m hrpose bench "${@:3}" --device cuda "${batches[@]}" --json "$OUT/$name.json"
}
run_bottlenecks() { bench bottlenecks "1 32 128" bottlenecks --dtype bf16 --only x32x24; }
run_chains() { bench chains "1 8 32 128 512" bottlenecks --dtype bf16; }
run_ops() { bench decode "1 8 32 128 512" decode && bench crop_ram_sum "1 32" crop ram_sum; }
run_pipeline() { bench pipeline "1 4" pipeline; }
run_network() { bench "$1" "1 128 32" "$1" --dtype bf16; }

run_profile() {
  local kinds=(mma) kernels n failed=0
  [[ ${HRPOSE_CUDA_BOTTLENECKS:-} == mma ]] || kinds+=(wgmma)
  for kernels in "${kinds[@]}"; do
    for n in 1 128; do
      HRPOSE_CUDA_BOTTLENECKS=$kernels "$PYTHON" benchmarks/profile_network.py dpn4_64 --batch "$n" --ours || failed=1
    done
  done
  return $failed
}
run_compiled() {
  local n failed=0
  for n in 128 1; do
    "$PYTHON" benchmarks/profile_network.py dpn4_64 --batch "$n" || failed=1
  done
  return $failed
}
run_ncu() {
  have ncu || { echo "skipped: there is no ncu on PATH"; return 0; }
  # Of the second call, behind optimize's own check and the first one with 34 launches each: conv1, conv2, and the first
  # dilation pyramid with its head.
  local what='bottlenecks_|Duration|Throughput|Occupancy|Registers Per|Warp Cycles Per Issued|Hit Rate' n failed=0
  for n in 1 128; do
    ncu --clock-control none --kernel-name regex:bottlenecks --launch-skip 68 --launch-count 16 --section SpeedOfLight \
      --section Occupancy --section LaunchStats --section WarpStateStats --section MemoryWorkloadAnalysis \
      "$PYTHON" benchmarks/profile_network.py dpn4_64 --batch "$n" --run >"$OUT/ncu-$n.log" 2>&1 || failed=1
    grep -E "$what" "$OUT/ncu-$n.log" || { tail -n 5 "$OUT/ncu-$n.log" && failed=1; }
  done
  return $failed
}

run_step() {
  case $1 in
  dpn* | hrnet*) run_network "$1" ;;
  *) "run_$1" ;;
  esac
}

if [[ ${1:-} == --inside ]]; then # of `timeout` below, which starts programs, not functions
  run_step "$2"
  exit
fi
steps=${*:-$STEPS} failed="" unbuilt=""
for step in $steps; do
  [[ -v SECONDS_OF[$step] ]] || { echo "on_gpu.sh: step must be one of" $STEPS", got $step" >&2; exit 2; }
done
mkdir -p "$OUT" || exit
for step in $steps; do
  limit=${LIMIT:-${SECONDS_OF[$step]}} left=$((BUDGET - SECONDS)) start=$SECONDS code=0 why=""
  have nvidia-smi || why="there is no nvidia-smi on PATH, so no NVIDIA GPU"
  ((left >= (limit + 1) / 2)) || why="$left of $BUDGET seconds are left, too few for one that may take $limit"
  [[ -z $unbuilt ]] || why="there is no build"
  if [[ -n $why ]]; then
    echo "skipped: $why" | tee "$OUT/$step.log"
  else
    timeout -k 10 "$((left < limit ? left : limit))" bash benchmarks/on_gpu.sh --inside "$step" >"$OUT/$step.log" 2>&1
    code=$?
    ((code == 124 || code == 137)) && echo "stopped after $((SECONDS - start)) seconds" >>"$OUT/$step.log"
  fi
  if ((code)); then
    failed+=" $step"
    [[ $step == build ]] && unbuilt=yes
    [[ $step == warpgroups ]] && export HRPOSE_CUDA_BOTTLENECKS=mma
  fi
  echo "$step: exit code $code, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
  [[ -z ${ARCHIVE:-} ]] || tar -czf "$ARCHIVE" -C "$OUT" .
done
for step in $steps; do
  grep -q '^skipped: ' "$OUT/$step.log" && continue
  printf '\n==== %s\n' "$step"
  tail -n 6 "$OUT/$step.log" | cut -c 1-160
done
printf '\n==== all reports: each of ours, how many times as fast it is as the best of PyTorch\n'
"$PYTHON" - "$OUT"/*.json <<'END'
import json, os, sys

for file in filter(os.path.exists, sorted(sys.argv[1:], key=lambda f: os.path.exists(f) and os.path.getmtime(f))):
    for row in json.load(open(file))["rows"]:
        name = f"{row['op']:12} {row['shape']:34} {row['dtype']}"
        if row["error"]:
            print(name, f"ERROR {row['error']}")
        theirs = [e["median"] for e in row["entries"] if e["kind"] in ("pytorch", "reference")]
        for e in row["entries"]:
            if e["kind"] == "hrpose":
                ratio, share = min(theirs, default=float("nan")) / e["median"], f"{e['share']:6.1%} of peak"
                print(name, f"{1e3 * e['median']:10.1f} us {share} {ratio:6.2f} x  {e['name']}")
        for who, why in row["absent"].items():
            print(name, f"without {who}: {why}")
END
[[ -z $failed ]] || { printf '\nfailed:%s\n' "$failed"; exit 1; }
