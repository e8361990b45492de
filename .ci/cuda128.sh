#!/bin/bash
# Compile the CUDA backend with what PyPI has of CUDA 12.8, which has no nvcc there.
#
#   pip install --no-deps --target PACKAGES nvidia-cuda-{nvcc,runtime,cccl}-cu12==12.8.*
#   .ci/cuda128.sh PACKAGES [ARCHITECTURE...]
#
# Headers, libdevice, ptxas and the runtime are 12.8's. The front ends are those of the nvcc on the path (13), told that
# they are 12.8's, and the PTX that they make is called ISA 8.7, the newest that ptxas of 12.8 takes: an instruction that
# came later is an error. Stubs of kernels are called as 12.8's headers have it. How 12.8's own front ends read the
# sources remains untried. It says which kernels keep registers in memory; build/cuda128/*.log has those of all.
set -euo pipefail
cd "$(dirname "$0")/.."
packages=$(realpath "$1")/nvidia
shift
out=${OUT:-build/cuda128}
mkdir -p "$out"
top=$(dirname "$(dirname "$(nvcc --dryrun -c x.cu 2>&1 | sed -n 's/^#\$ CICC_PATH=\(.*\)\/\.\.\/nvvm\/bin/\1\/x/p')")")
headers=(-I"$packages/cuda_runtime/include" -I"$packages/cuda_nvcc/include" -I"$packages/cuda_cccl/include")
codes=()
for architecture in "${@:-80}"; do codes+=(-gencode "arch=compute_$architecture,code=sm_$architecture"); done
export PATH=$top/bin:$PATH CICC_PATH=$top/nvvm/bin NVVMIR_LIBRARY_DIR=$packages/cuda_nvcc/nvvm/libdevice

compile() {
    local source=$1 name
    name=$(basename "$source")
    mkdir -p "$out/$name.tmp"
    nvcc --dryrun --keep --keep-dir "$out/$name.tmp" -std=c++20 -O3 -DNDEBUG -Icuda -Icpp/include -Icpp/src \
        -diag-suppress=554 -Xcompiler=-fPIC,-Wall,-Wextra \
        -Xptxas=-warn-spills,-warn-lmem-usage,-v "${codes[@]}" -c -o "$out/$name.o" "$source" 2>&1 |
        sed -nE '/^#\$ (gcc|cudafe\+\+|"\$CICC_PATH|ptxas|fatbinary) ?/s/^#\$ //p' |
        sed -E "s#\"-I[^\"]*/targets/x86_64-linux/include\"#${headers[*]}#; s#\"-isystem\" \"[^\"]*/cccl\"##
            s/(VER_MAJOR__=)13/\112/g; s/(VER_MINOR__=)[0-9]+/\18/g; s/(VER_BUILD__=)[0-9]+/\193/g
            s#^ptxas (.*\"([^\"]*\.ptx)\".*)#sed -i 's/^\.version .*/.version 8.7/' \"\2\" \&\& \"$packages/cuda_nvcc/bin/ptxas\" \1#
            s#^(gcc .* -c .*)#sed -i 's/, 0U);/);/g' $out/$name.tmp/*.stub.c \&\& \1#" \
            > "$out/$name.sh"
    bash -eo pipefail "$out/$name.sh" > "$out/$name.log" 2>&1 || { cat "$out/$name.log"; return 1; }
    echo "$name: $(grep -c 'Used .* registers' "$out/$name.log") kernels"
    grep -i 'warning' "$out/$name.log" || true
}
export -f compile
export out packages
for source in cuda/*.cu; do compile "$source"; done
for source in cuda/*.cpp; do
    g++ -std=c++20 -O1 -fPIC -Wall -Wextra -Werror -Icuda -Icpp/include -Icpp/src -isystem "$packages/cuda_runtime/include" \
        -isystem "$packages/cuda_nvcc/include" \
        -DOCTAVO_VERSION='"0"' -DOCTAVO_CUDA_ARCHITECTURES="\"${*:-80}\"" -c "$source" -o "$out/$(basename "$source").o"
done
g++ -shared -o "$out/liboctavo_cuda.so" "$out"/*.o "$packages/cuda_runtime/lib/libcudart.so.12" -ldl -Wl,-z,defs
echo "$out/liboctavo_cuda.so"
