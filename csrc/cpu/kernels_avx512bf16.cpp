// Kernels for AVX-512 with BF16 dot products (Zen 4 and later).
#define HRPOSE_ISA_NAME avx512bf16
#include "kernels.inl"
