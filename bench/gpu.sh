#!/usr/bin/env bash
# Everything that needs a GPU, in under 15 minutes and without a network: builds octavo with the CUDA backend from what is
# installed, runs the C++ tests on the device, measures what matters most, and then, as far as time goes, the tests in
# Python, compute-sanitizer and the whole benchmark.
#
#   bench/gpu.sh [--continue] [OUT [LOGS]]   OUT: where the results go, at most 8 files, default build/gpu/results;
#                                            LOGS: the output of every step, default build/gpu/logs
#
# Needs a GPU, nvcc, a C++20 compiler, and a Python ($PYTHON, else python3) with pip, torch (CUDA), numpy, tqdm, pybind11,
# scikit-build-core, cmake and ninja. Wheels that the machine lacks, pytest and hypothesis among them, are taken from the
# folder wheels/, where there is one. Where pytest or compute-sanitizer is missing, that step is left out, and says so.
# Where the backend cannot be built here, prebuilt/liboctavo_cuda.so is taken instead, if it is there: any Python's does.
#
# Results are written after every step anew, so that whoever is killed loses one step: summary.txt, logs.tgz, and by the
# name of the GPU and the date -key.json (few shapes, many rows), -mma.json (some without wgmma), -no-prefetch.json (few
# rows, without asking for weights ahead), -graph.json (as CUDA graphs), -kernels.txt (what each kernel takes) and .json
# (every shape). --continue goes on behind the steps that an earlier call did well. Ends with a summary, and with a
# status that is not 0 where a step failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
limit=${OCTAVO_GPU_SECONDS:-840}  # of all together
continued=
if [ "${1-}" = --continue ]; then continued=yes; shift; fi
out=$(realpath -m "${1:-build/gpu/results}")
logs=$(realpath -m "${2:-build/gpu/logs}")
work=build/gpu
[ -n "$continued" ] || rm -rf "$work/done"
mkdir -p "$out" "$logs" "$work/done"
summary=$logs/summary.txt
: >"$summary"
python=${PYTHON:-python3}
jobs=$(nproc)

# What comes back, whatever ends this: at most 8 files do, so all logs are one. Made beside it first: a kill may come now.
keep() {
  cp "$summary" "$work/.summary.$BASHPID" && mv "$work/.summary.$BASHPID" "$out/summary.txt"
  tar -czf "$work/.logs.$BASHPID" -C "$logs" . 2>/dev/null
  mv "$work/.logs.$BASHPID" "$out/logs.tgz"
}

note() {
  printf '%-28s %s\n' "$1" "$2" >>"$summary"
  keep
}

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
  if [ -e "$work/done/$name" ]; then
    note "$name" "ok, before"
    return 0
  fi
  if ((seconds > limit - SECONDS)); then seconds=$((limit - SECONDS)); fi
  if ((seconds < 1)); then
    note "$name" "failed: no time was left"
    return 1
  fi
  echo "=== $name"
  timeout --kill-after=5 "$seconds" "$@" >"$logs/$name.log" 2>&1
  status=$?
  if [ $status = 0 ]; then
    touch "$work/done/$name"
    note "$name" "ok, $((SECONDS - began)) s"
  else
    if [ $status = 124 ] || [ $status = 137 ]; then note "$name" "failed: took more than $seconds s"; else
      note "$name" "failed with status $status, $((SECONDS - began)) s"
    fi
    echo "--- $name:"
    tail -n 25 "$logs/$name.log"
  fi
  return $status
}

# --- set up ---------------------------------------------------------------------------------------------------------

nvidia-smi >"$logs/nvidia-smi.txt" 2>&1
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
if [ -z "$architecture" ]; then note setup "failed: nvidia-smi sees no GPU"; exit 2; fi
# What only this GPU has, products of warpgroups among it.
kind=$architecture
if [ "$architecture" = 90 ]; then kind=90a; fi
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr -cs '[:alnum:]' - | tr '[:upper:]' '[:lower:]')$(date +%F)
venv=$PWD/$work/venv
# Without pip: Debian's and Ubuntu's Pythons have no ensurepip; that of $PYTHON is found as its other packages are.
"$python" -m venv --without-pip --system-site-packages "$venv" || { note venv failed; exit 2; }
py=$venv/bin/python
# Where $PYTHON is of a virtual environment itself, "system" is not where its packages are.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sep="\n")' \
  >"$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer.pth"
scripts=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')  # cmake and ninja may be there
export PATH=$venv/bin:$PATH:$scripts
if [ -d wheels ]; then step wheels 60 "$py" -m pip install --no-index --no-deps wheels/*.whl || exit 2; fi
# The first import reads gigabytes from a cold disk: meanwhile the compilers run.
"$py" -c 'import torch; torch.zeros(1, device="cuda"); import pytest, hypothesis' >"$logs/warm.log" 2>&1 &
# cuBLASLt for the programs that have no PyTorch in them, which loads its own.
cublas=$("$python" -c 'import nvidia, pathlib; print(pathlib.Path(next(iter(nvidia.__path__)), "cu13", "lib"))' 2>/dev/null)
for sanitizer in "$(command -v compute-sanitizer)" /usr/local/cuda/bin/compute-sanitizer \
  "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" ""; do
  if [ -x "$sanitizer" ]; then break; fi
done

# --- build: the wheel with the CUDA backend, and beside it the C++ tests, which load the wheel's backend --------------

step build-tests 240 sh -c "cmake -S . -B $work/cpp -G Ninja -DOCTAVO_TESTS=ON -DCMAKE_BUILD_TYPE=Release &&
  cmake --build $work/cpp -j $jobs" &
install=("$py" -m pip install --no-build-isolation --no-deps --force-reinstall .)
if OCTAVO_CUDA=1 OCTAVO_CUDA_ARCHITECTURES=$kind-real CMAKE_BUILD_PARALLEL_LEVEL=$jobs \
  step build-wheel 240 "${install[@]}"; then
  backend='pathlib.Path(octavo.__file__).parent / "liboctavo_cuda.so"'
elif [ -f prebuilt/liboctavo_cuda.so ]; then
  CMAKE_BUILD_PARALLEL_LEVEL=$jobs step build-without-cuda 120 "${install[@]}" || exit 1
  backend='pathlib.Path("prebuilt/liboctavo_cuda.so").resolve()'
  export OCTAVO_CUDA_LIBRARY=$PWD/prebuilt/liboctavo_cuda.so
else
  exit 1
fi
wait
step import 60 "$py" -c 'import octavo; i = octavo.info(); print(i); assert "cuda" in i["backends"], i["cuda"]' || exit 1
OCTAVO_CUDA_LIBRARY=$("$py" -c "import octavo, pathlib; print($backend)")
export OCTAVO_CUDA_LIBRARY

# --- C++ tests. A program that cannot use the device ends with status 77, which is a failure here ---------------------

for test in dequantize gemm linear outlier quantize; do
  OCTAVO_TEST_DEVICE=cuda step "test-cpp-$test" 60 "$work/cpp/tests/cpp/test_$test" &
done
wait
OCTAVO_TEST_DEVICE=cuda LD_LIBRARY_PATH=$cublas step test-cpp-cublaslt 60 "$work/cpp/tests/cpp/test_gemm"

# Products of warpgroups were tried when the device was first used (compute capability 9.0).
step wgmma 60 "$py" -c 'import torch, octavo; octavo.quantize(torch.ones(1, 64, device="cuda", dtype=torch.float16))
found = octavo.info()["cuda"]["wgmma"]; print(found); assert "wrong" not in found, found'

# --- the figures that matter most, before anything that may take long -------------------------------------------------

bench=(env PYTHONPATH=bench "$py" -m octavo_bench bench --device cuda)
key=(--shapes 4096,16384 768,3072 8192,8192 --rows 1 8 16 64 65 128 256 1024 4096 --seconds 0.2)
step key-figures 100 "${bench[@]}" "${key[@]}" --outliers 0 6 64 --limit 80 --json "$out/$name-key.json"
# The same without products of warpgroups.
OCTAVO_CUDA_WGMMA=0 step mma 40 "${bench[@]}" --shapes 4096,16384 8192,8192 --rows 128 256 1024 4096 --seconds 0.2 \
  --outliers 6 --limit 30 --json "$out/$name-mma.json"
# The same without asking for weights before the product.
OCTAVO_CUDA_PREFETCH=0 step no-prefetch 30 "${bench[@]}" --shapes 4096,16384 4096,4096 --rows 1 16 64 128 256 \
  --seconds 0.2 --outliers 6 --limit 22 --json "$out/$name-no-prefetch.json"
step graphs 60 "${bench[@]}" "${key[@]}" --outliers 6 --graph --limit 45 --json "$out/$name-graph.json"
step kernels 60 env PYTHONPATH=bench "$py" -m octavo_bench.layers.kernels "$out/$name-kernels.txt"

# --- the rest of the tests --------------------------------------------------------------------------------------------

if missing=$("$py" -c 'import pytest, hypothesis' 2>&1); then
  workers=$("$py" -c 'import xdist; print("-n 8")' 2>/dev/null)
  # shellcheck disable=SC2086
  step test-python 150 "$py" -m pytest -q $workers --maxfail=40 --tb=short --no-header -p no:cacheprovider -k cuda \
    tests/python/test_{cuda,dequantize,errors,gemm,linear,outlier,quantize,weight}.py
else
  note test-python "left out: ${missing##*$'\n'}"
fi

# Small cases of every kernel: an instrumented one takes some ten times as long.
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck synccheck; do
    OCTAVO_TEST_DEVICE=cuda step "$tool" 90 sh -c "
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
step benchmark 300 "${bench[@]}" --json "$out/$name.json" --limit $((left < 260 ? left : 260))
cat "$logs/benchmark.log"
