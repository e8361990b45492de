// Where cuda/gemm_cublaslt.cpp finds a stand-in for cuBLASLt on the emulated GPU (cublaslt.cpp).
#pragma once

namespace simt {

// Whether there is one: not where the environment has OCTAVO_SIMT_CUBLASLT=missing.
bool has_cublaslt();

// A function by its name in cuBLASLt, or null.
void* cublaslt_symbol(const char* name);

}  // namespace simt
