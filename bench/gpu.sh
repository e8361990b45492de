#!/usr/bin/env bash
# Everything that needs a GPU, in under 9 minutes and without a network: builds octavo with the CUDA backend from what is
# installed, runs the test suite on the device, compute-sanitizer over a part of it, and the benchmark.
#
#   bench/gpu.sh [OUT]      OUT: where results go, default bench/results/gpu
#
# Needs a GPU, nvcc 13, a C++20 compiler, and a Python with torch (CUDA), numpy, pybind11, scikit-build-core, cmake, ninja.
# pytest, hypothesis and other wheels that the machine lacks are taken from the folder wheels/, where there is one.
# Ends with a summary, and with a status that is not 0 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-bench/results/gpu}")
work=build/gpu
mkdir -p "$out" "$work"
python=${PYTHON:-python3}
jobs=$(nproc)
summary=()
failed=0

# step NAME LIMIT COMMAND...: run with a time limit in seconds, keep the log, note how it went.
step() {
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  echo "=== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n 5 "$out/$name.log"
  [ $status = 0 ] || failed=1
  summary+=("$(printf '%-24s %-8s %4d s' "$name" "$([ $status = 0 ] && echo ok || echo "failed: $status")" $((SECONDS - started)))")
  return $status
}

"$python" -m venv --system-site-packages "$work/venv"
py=$PWD/$work/venv/bin/python
[ -d wheels ] && "$py" -m pip install -q --no-index --find-links wheels --no-deps wheels/*.whl
architecture=$("$py" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())') || {
  echo "gpu.sh: $python has no torch that sees a GPU"; exit 2; }
nvidia-smi >"$out/nvidia-smi.txt" 2>&1
export OCTAVO_CUDA=1 OCTAVO_CUDA_ARCHITECTURES=$architecture CMAKE_BUILD_PARALLEL_LEVEL=$jobs

step build-python 150 "$py" -m pip install --no-build-isolation --no-deps . &&
  step build-cpp 150 sh -c "
    cmake -S . -B $work/cpp -G Ninja -DOCTAVO_TESTS=ON -DOCTAVO_CUDA=ON -DOCTAVO_CUDA_ARCHITECTURES=$architecture &&
    cmake --build $work/cpp -j $jobs" || exit 1

step test-cpp 60 ctest --test-dir "$work/cpp" -R '\.cuda$' --output-on-failure
if "$py" -c 'import pytest, hypothesis' 2>/dev/null; then
  step test-python 120 "$py" -m pytest tests/python -q -x --no-header -p no:cacheprovider -k 'cuda' \
    tests/python/test_{cuda,dequantize,gemm,linear,outlier,quantize,weight,errors}.py
else
  summary+=("test-python              left out: no pytest or no hypothesis")
fi
for tool in memcheck racecheck initcheck synccheck; do
  for test in quantize linear; do
    OCTAVO_TEST_DEVICE=cuda OCTAVO_CUDA_LIBRARY=$(find "$work/cpp" -name liboctavo_cuda.so) \
      step "$tool-$test" 25 compute-sanitizer --tool $tool --error-exitcode 9 \
      "$work/cpp/tests/cpp/test_$test" small
  done
done
step benchmark $((530 - SECONDS > 60 ? 530 - SECONDS : 60)) "$py" bench/gpu.py --output "$out" \
  --minutes "$(((510 - SECONDS) / 60))"
tail -n 200 "$out/benchmark.log"

echo "=== summary"
printf '%s\n' "${summary[@]}" | tee "$out/summary.txt"
exit $failed
