// Kernels for AVX-512 with AMX tiles of BF16 (Sapphire Rapids and later).
#define HRPOSE_ISA_NAME amx
#include "kernels.inl"
