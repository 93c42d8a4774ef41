// Kernels for AVX-512 F, BW, DQ and VL (Skylake-X, Zen 4 and later).
#define HRPOSE_ISA_NAME avx512
#include "kernels.inl"
