#!/usr/bin/env bash
# Half an hour on a machine with an NVIDIA GPU: is everything right there, how fast is it, and what to improve next.
#
#     benchmarks/on_gpu.sh                     # all steps, in this order
#     benchmarks/on_gpu.sh machine build tests
#
#   machine    the card, its clocks as they are, the driver, the compiler, torch
#   build      hrpose with kernels for this card alone, in place
#   tests      ops and networks on the card against float64, their references and themselves
#   sanitizer  each kernel once under compute-sanitizer
#   ops        `hrpose bench` of decode, crop and ram_sum
#   bottlenecks, dpn4_64, dpn4_32, hrnet_w32
#              `hrpose bench` of that op or network in bfloat16
#   pipeline   `hrpose bench` of the way from an image file to keypoints, with CUDA graphs and without
#   profile    the kernels of dpn4_64 one by one, ours beside torch.compile's; ours by ncu too ($OUT/ncu-*.log)
#
# Steps write $OUT/<step>.log and tables as $OUT/*.json (OUT: ./gpu-results). A step takes at most $LIMIT seconds (570).
# A failing one does not keep the others from running; the exit code is then 1. Where a step cannot run, it says why.
# $WHEELS may name a folder of wheels (pycocotools, pillow, tqdm), for a machine without a network. The card's settings
# are left as they are found.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OUT=${OUT:-$PWD/gpu-results} LIMIT=${LIMIT:-570} PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
# 3x3 convolutions by cuDNN alone: tuning Triton's too takes minutes per row. 1x1 are tuned as matrix products anyway.
export TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS=${TORCHINDUCTOR_MAX_AUTOTUNE_CONV_BACKENDS:-ATEN}
STEPS="machine build tests sanitizer ops bottlenecks dpn4_64 dpn4_32 hrnet_w32 pipeline profile"

have() { command -v "$1" >/dev/null; }

run_machine() {
  nvidia-smi
  nvidia-smi --query-gpu=name,compute_cap,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu --format=csv
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

run_tests() {
  "$PYTHON" -c 'import torch; torch.zeros(1).cuda()' || return # or all tests would be skipped, and nothing failed
  "$PYTHON" -m pytest -q -rs -k cuda tests/ops tests/test_cuda.py
}

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

# bench NAME BATCHES ROWS...: a report per batch, so that a limit costs the rest and not all.
bench() {
  local name=$1 batches=$2 n failed=0
  shift 2
  for n in $batches; do
    "$PYTHON" -m hrpose bench "$@" --device cuda --batch "$n" --json "$OUT/$name-$n.json" || failed=1
  done
  return $failed
}
run_ops() { bench ops "1 8 32 128 512" decode && bench crop_ram_sum "1 32" crop ram_sum; }
run_bottlenecks() { bench bottlenecks "1 8 32 128 512" bottlenecks --dtype bf16; }
run_pipeline() { bench pipeline "1 4" pipeline; }
run_network() { bench "$1" "1 32 128" "$1" --dtype bf16; }

run_profile() {
  local n failed=0
  for n in 1 128; do
    "$PYTHON" benchmarks/profile_network.py dpn4_64 --batch "$n" || failed=1
  done
  have ncu || { echo "skipped: there is no ncu on PATH"; return $failed; }
  # Of the second call, behind optimize's own check and the first one with 34 launches each: conv1, conv2, and the first
  # dilation pyramid with its head.
  local what='bottlenecks_|Duration|Throughput|Occupancy|Registers Per|Warp Cycles Per Issued|Hit Rate'
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
steps=${*:-$STEPS} failed=""
for step in $steps; do
  [[ " $STEPS " == *" $step "* ]] || { echo "on_gpu.sh: step must be one of $STEPS, got $step" >&2; exit 2; }
done
mkdir -p "$OUT" || exit
for step in $steps; do
  start=$SECONDS
  if have nvidia-smi; then
    timeout -k 10 "$LIMIT" bash benchmarks/on_gpu.sh --inside "$step" >"$OUT/$step.log" 2>&1
  else
    echo "skipped: there is no nvidia-smi on PATH, so no NVIDIA GPU" >"$OUT/$step.log"
  fi
  code=$?
  ((code == 124)) && echo "stopped after $LIMIT seconds" >>"$OUT/$step.log"
  ((code)) && failed+=" $step"
  echo "$step: exit code $code, $((SECONDS - start)) s" | tee -a "$OUT/summary.txt"
done
for step in $steps; do
  printf '\n==== %s\n' "$step"
  tail -n 14 "$OUT/$step.log" | cut -c 1-200
done
printf '\n==== all reports: the faster of ours, how many times as fast it is as the best of PyTorch\n'
"$PYTHON" - "$OUT"/*.json <<'END'
import json, os, sys

for file in filter(os.path.exists, sorted(sys.argv[1:], key=lambda f: os.path.exists(f) and os.path.getmtime(f))):
    for row in json.load(open(file))["rows"]:
        ours = min((e for e in row["entries"] if e["kind"] == "hrpose"), key=lambda e: e["median"], default=None)
        name, ratio = f"{row['op']:12} {row['shape']:34} {row['dtype']}", row["ratio_pytorch"] or float("nan")
        found = ours and f"{1e3 * ours['median']:10.1f} us {ours['share']:6.1%} of peak {ratio:6.2f} x  {ours['name']}"
        print(name, found or f"ERROR {row['error']}")
END
[[ -z $failed ]] || { printf '\nfailed:%s\n' "$failed"; exit 1; }
