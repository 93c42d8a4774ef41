// Kernels for AVX2 + FMA + BMI2 (Haswell, Zen and later).
#define HRPOSE_ISA_NAME avx2
#include "kernels.inl"
