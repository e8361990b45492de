#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes and without a network: builds octavo with the CUDA backend from what is
# installed, runs the test suite on the device, compute-sanitizer over a part of it, and the benchmark.
#
#   bench/gpu.sh [OUT [LOGS]]      OUT: where <gpu>-<date>.json goes, default bench/results;
#                                  LOGS: the output of every step and summary.txt, default build/gpu/logs
#
# Needs a GPU, nvcc 13, a C++20 compiler, and a Python ($PYTHON, else python3) with torch (CUDA), numpy, tqdm, pybind11,
# scikit-build-core, cmake and ninja. Wheels that the machine lacks, pytest and hypothesis among them, are taken from the
# folder wheels/, where there is one. Where pytest or compute-sanitizer is missing, that step is left out, and says so.
# Ends with a summary, and with a status that is not 0 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
limit=${OCTAVO_GPU_SECONDS:-520}  # of all together
out=$(realpath -m "${1:-bench/results}")
logs=$(realpath -m "${2:-build/gpu/logs}")
work=build/gpu
mkdir -p "$out" "$logs" "$work"
summary=$logs/summary.txt
: >"$summary"
python=${PYTHON:-python3}
jobs=$(nproc)

note() { printf '%-28s %s\n' "$1" "$2" >>"$summary"; }

# Whatever happens, the summary comes last, and tells the status.
finish() {
  local status=$?
  wait
  echo "=== summary"
  cat "$summary"
  if [ $status = 0 ] && grep -q 'failed' "$summary"; then status=1; fi
  echo "$SECONDS s"
  exit $status
}
trap finish EXIT

# step NAME LIMIT COMMAND...: run with a limit in seconds, and within that of all; keep the log, note how it went.
step() {
  local name=$1 seconds=$2 began=$SECONDS status
  shift 2
  if ((seconds > limit - SECONDS)); then seconds=$((limit - SECONDS)); fi
  if ((seconds < 1)); then
    note "$name" "failed: no time was left"
    return 1
  fi
  echo "=== $name"
  timeout --kill-after=5 "$seconds" "$@" >"$logs/$name.log" 2>&1
  status=$?
  if [ $status = 0 ]; then
    note "$name" "ok, $((SECONDS - began)) s"
  else
    if [ $status = 124 ]; then note "$name" "failed: took more than $seconds s"; else
      note "$name" "failed with status $status, $((SECONDS - began)) s"
    fi
    echo "--- $name:"
    tail -n 25 "$logs/$name.log"
  fi
  return $status
}

# --- set up ---------------------------------------------------------------------------------------------------------

venv=$PWD/$work/venv
"$python" -m venv --system-site-packages "$venv" || { note venv failed; exit 2; }
py=$venv/bin/python
# Where $PYTHON is of a virtual environment itself, "system" is not where its packages are.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
  >"$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
if [ -d wheels ]; then step wheels 60 "$py" -m pip install --no-index --no-deps wheels/*.whl || exit 2; fi
export PATH=$venv/bin:$PATH
architecture=$("$py" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())') || {
  note setup "failed: $python has no torch that sees a GPU"
  exit 2
}
nvidia-smi >"$logs/nvidia-smi.txt" 2>&1
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs '[:alnum:]' - | tr '[:upper:]' '[:lower:]')$(date +%F)
for sanitizer in "$(command -v compute-sanitizer)" /usr/local/cuda/bin/compute-sanitizer \
  "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" ""; do
  if [ -x "$sanitizer" ]; then break; fi
done

# --- build: the wheel with the CUDA backend, and beside it the C++ tests, which load the wheel's backend --------------

step build-tests 170 sh -c "cmake -S . -B $work/cpp -G Ninja -DOCTAVO_TESTS=ON -DCMAKE_BUILD_TYPE=Release &&
  cmake --build $work/cpp -j $jobs" &
OCTAVO_CUDA=1 OCTAVO_CUDA_ARCHITECTURES=$architecture CMAKE_BUILD_PARALLEL_LEVEL=$jobs \
  step build-wheel 170 "$py" -m pip install --no-build-isolation --no-deps --force-reinstall . || exit 1
wait
step import 60 "$py" -c 'import octavo; i = octavo.info(); print(i); assert "cuda" in i["backends"], i["cuda"]' || exit 1
OCTAVO_CUDA_LIBRARY=$("$py" -c 'import octavo, pathlib; print(pathlib.Path(octavo.__file__).parent / "liboctavo_cuda.so")')
export OCTAVO_CUDA_LIBRARY

# --- tests. A program that cannot use the device ends with status 77, which is a failure here -------------------------

for test in dequantize gemm linear outlier quantize; do
  OCTAVO_TEST_DEVICE=cuda step "test-cpp-$test" 60 "$work/cpp/tests/cpp/test_$test" &
done
wait
if missing=$("$py" -c 'import pytest, hypothesis' 2>&1); then
  step test-python 110 "$py" -m pytest -q --maxfail=20 --no-header -p no:cacheprovider -k cuda \
    tests/python/test_{cuda,dequantize,errors,gemm,linear,outlier,quantize,weight}.py
else
  note test-python "left out: ${missing##*$'\n'}"
fi

# Small cases of every kernel: an instrumented one takes some ten times as long.
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck synccheck; do
    OCTAVO_TEST_DEVICE=cuda step "$tool" 75 sh -c "
      for each in quantize:literal quantize:excluded_columns quantize:weight outlier:literal gemm:literal gemm:deep \
        linear:literal linear:kept_outlier_weights dequantize:literal; do
        echo \"\$each\"
        '$sanitizer' --tool $tool --error-exitcode 9 '$work/cpp/tests/cpp/test_'\"\${each%:*}\" \"\${each#*:}\" || exit
      done" &
  done
  wait
else
  note sanitizer "left out: no compute-sanitizer"
fi

# --- benchmark: what is left, less some for what is under way and for writing -----------------------------------------

left=$((limit - SECONDS - 40))
step benchmark 300 env PYTHONPATH=bench "$py" -m octavo_bench bench --device cuda --json "$out/$name.json" \
  --limit $((left < 260 ? left : 260))
cat "$logs/benchmark.log"
