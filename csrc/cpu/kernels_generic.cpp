// Kernels for any processor: the compiler's baseline flags.
#define HRPOSE_ISA_NAME generic
#include "kernels.inl"
