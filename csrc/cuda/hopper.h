// What compute capability 9.0 alone has (target sm_90a): copies of whole blocks of bytes into shared memory, and the
// tensor cores of a warpgroup. Like device.h it exists twice; the other one is tests/cuda_emulation/emulator_hopper.h.
// None of it has run on a card yet.
//
// Both work through the asynchronous proxy, a way to shared memory of its own. What copy_bulk brings is there for
// multiply_group in every thread that has waited for it; what ordinary stores write is there after publish_stores() by
// the writing thread and a barrier.
#pragma once
#include "device.h"

namespace hrpose::cuda {

constexpr int kWarpgroup = 128; // threads: warps 4 i to 4 i + 3 of a block

// In shared memory: whether the bytes of one copy_bulk have come.
struct alignas(8) Arrival {
  uint64_t state; // of an mbarrier
};

} // namespace hrpose::cuda

#ifdef HRPOSE_EMULATION
#include "emulator_hopper.h"
#else

namespace hrpose::cuda {

// ---- copies ---------------------------------------------------------------------------------------------------------

// One thread makes an Arrival ready for one copy. Before the first copy it calls announce(), and before others wait
// there is a barrier.
__device__ __forceinline__ void prepare(Arrival &arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&arrival)) : "memory");
}
__device__ __forceinline__ void announce() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// By one thread. Addresses and size are multiples of 16. A block must not end before its copies have come.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, int bytes, Arrival &arrival) {
#if __CUDA_ARCH__ >= 900
  const uint32_t arrives = shared_address(&arrival);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrives), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(arrives)
               : "memory");
#endif
}
__device__ __forceinline__ void wait_for(Arrival &arrival) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{\n"
               ".reg .pred come;\n"
               "again: mbarrier.try_wait.parity.shared::cta.b64 come, [%0], 0;\n"
               "@!come bra again;\n"
               "}" ::"r"(shared_address(&arrival))
               : "memory");
#endif
}

__device__ __forceinline__ void publish_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// Where a matrix of 16-bit values lies in shared memory, without swizzling, inner dimension (K) by K of 8: its core
// matrices, 8 outputs x 8 inputs of it, are 128 bytes in a row, 16 for each output. In units of 16 bytes, as 14 bits
// each:
//   bits  0 to 13: the address of the first core matrix;
//   bits 16 to 29: "leading dimension byte offset", from one core matrix to that of the next 8 inputs;
//   bits 32 to 45: "stride dimension byte offset", from one core matrix to that of the next 8 outputs.
// All other bits are 0: no base offset (49 to 51), no swizzling (62 and 63). So says the PTX ISA of wgmma's descriptor
// for K-major operands, and CUTLASS of its layout INTERLEAVE.
__device__ __forceinline__ uint64_t descriptor(const void *matrix, int next_inputs, int next_outputs) {
  return uint64_t((shared_address(matrix) & 0x3ffff) >> 4) | uint64_t(next_inputs >> 4) << 16 |
         uint64_t(next_outputs >> 4) << 32;
}
// That of the matrix so many bytes on.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// c += A B for a warpgroup, A of 64 x 16 values of T, B of 16 x 8 kTiles by its descriptor. Warp i of the four has rows
// 16 i to 16 i + 15 of A and c as it has them for mma(); c[tile] has columns 8 tile to 8 tile + 7. All of these warps
// call it, with the same descriptor. It happens between here and a wait_products() of a group that commit_products()
// has closed since; until then c and a are not to be touched. fence_products() comes before the first one after they
// were.
template <class T, int kTiles>
__device__ __forceinline__ void multiply_group(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b);

#define HRPOSE_ROW(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define HRPOSE_MULTIPLY_32(Type, name)                                                                                 \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply_group<Type, 4>(float(&c)[4][4], const uint32_t(&a)[4], uint64_t b) {        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." name "." name                                           \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"                            \
                 " {%16, %17, %18, %19}, %20, 1, 1, 1, 0;"                                                             \
                 : HRPOSE_ROW(0), HRPOSE_ROW(1), HRPOSE_ROW(2), HRPOSE_ROW(3)                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }
#define HRPOSE_MULTIPLY_64(Type, name)                                                                                 \
  template <>                                                                                                          \
  __device__ __forceinline__ void multiply_group<Type, 8>(float(&c)[8][4], const uint32_t(&a)[4], uint64_t b) {        \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                           \
                 " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15,"                             \
                 " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31},"                   \
                 " {%32, %33, %34, %35}, %36, 1, 1, 1, 0;"                                                             \
                 : HRPOSE_ROW(0), HRPOSE_ROW(1), HRPOSE_ROW(2), HRPOSE_ROW(3), HRPOSE_ROW(4), HRPOSE_ROW(5),           \
                   HRPOSE_ROW(6), HRPOSE_ROW(7)                                                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                \
  }
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
HRPOSE_MULTIPLY_32(BFloat16, "bf16")
HRPOSE_MULTIPLY_32(Half, "f16")
HRPOSE_MULTIPLY_64(BFloat16, "bf16")
HRPOSE_MULTIPLY_64(Half, "f16")
#endif
#undef HRPOSE_MULTIPLY_64
#undef HRPOSE_MULTIPLY_32
#undef HRPOSE_ROW

// The compiler does not know that multiply_group() works on after its call: it computes these registers before this
// place, and what reads them after it.
template <int kTiles> __device__ __forceinline__ void hold(float (&c)[kTiles][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kTiles; ++i)
    asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
}
__device__ __forceinline__ void hold(uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("" : "+r"(a[i])::"memory");
}

__device__ __forceinline__ void fence_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void commit_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Waits until all but the last n groups are done.
template <int n> __device__ __forceinline__ void wait_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
#endif
}

} // namespace hrpose::cuda
#endif
