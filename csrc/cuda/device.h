// What kernels need beyond the CUDA language: launches, shared memory, conversions, and the instructions that have no
// function. All of it exists twice, here for nvcc and in tests/cuda_emulation/emulator.h for a C++ compiler, which runs
// the same .cu files on a CPU. Kernels therefore write no asm, no <<<>>> and no __shared__ of their own.
#pragma once
#include "kernels.h"
#include <cstddef>
#include <cstdint>

namespace hrpose::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
template <class T> constexpr bool kIsBFloat16 = false;
template <> constexpr bool kIsBFloat16<BFloat16> = true;

} // namespace hrpose::cuda

#ifdef HRPOSE_EMULATION
#include "emulator.h"
#else
#include <cuda_runtime.h>

namespace hrpose::cuda {

// ---- host ------------------------------------------------------------------------------------------------------------

inline const char *message(cudaError_t status) {
  if (status == cudaSuccess)
    return nullptr;
  cudaGetLastError(); // clears the error, so that it does not surface in somebody else's call
  return cudaGetErrorString(status);
}

// Of the current device.
inline const char *device_attribute(cudaDeviceAttr attribute, int *value) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return message(status == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : status);
}

// overlap: the kernel may start while the one before it in the stream still runs (on compute capability 9.0 and later);
// it calls wait_for_previous_kernel() before it touches what that one reads or writes.
struct Launch {
  dim3 grid, block;
  cudaStream_t stream;
  size_t shared_bytes = 0; // of dynamic_shared()
  bool overlap = false;
};

// Null, or what is wrong with the launch. What goes wrong in the kernel shows when somebody synchronises.
template <class... Params, class... Args>
const char *launch(const Launch &config, void (*kernel)(Params...), Args... args) {
  constexpr size_t kAlways = 48 << 10; // more shared memory than that is to be asked for
  if (config.shared_bytes > kAlways) {
    const cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const char *error = message(cudaFuncSetAttribute(kernel, most, int(config.shared_bytes))))
      return error;
  }
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t full = {};
  full.gridDim = config.grid, full.blockDim = config.block;
  full.dynamicSmemBytes = config.shared_bytes, full.stream = config.stream;
  full.attrs = &attribute;
  if (config.overlap) {
    int major = 0;
    if (const char *error = device_attribute(cudaDevAttrComputeCapabilityMajor, &major))
      return error;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    full.numAttrs = major >= 9;
  }
  return message(cudaLaunchKernelEx(&full, kernel, args...));
}

// ---- shared memory and copies into it --------------------------------------------------------------------------------

// The block's one T, of trivial type and uninitialised: the same T gives the same memory wherever it is asked for.
template <class T> __device__ __forceinline__ T &shared() {
  __shared__ T storage;
  return storage;
}

// Launch::shared_bytes, aligned to 128 bytes.
__device__ __forceinline__ unsigned char *dynamic_shared() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

__device__ __forceinline__ uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or 16 zero bytes if not `valid` (`from` must be a valid address all the same);
// there after wait_copies, for other threads after a barrier too. Both addresses are multiples of 16. Before sm_80, at
// once.
__device__ __forceinline__ void copy_async(void *to, const void *from, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
#else
  *static_cast<uint4 *>(to) = valid ? *static_cast<const uint4 *>(from) : uint4{0, 0, 0, 0};
#endif
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until all but the last n groups of this thread have arrived.
template <int n> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// ---- global memory ---------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load16(const void *p) { return *static_cast<const uint4 *>(p); }
// An assignment becomes four stores of four bytes where nvcc finds its words made one by one.
__device__ __forceinline__ void store16(void *p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// For what is read once: it takes no place in the L1 cache.
__device__ __forceinline__ uint4 load16_once(const void *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

// Brings the line of 128 bytes around `p` to the L2 cache.
__device__ __forceinline__ void prefetch(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// See Launch::overlap.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the next kernel may start, as far as there is room for its blocks.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- conversions -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
__device__ __forceinline__ float widen(Half v) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v.bits));
  return result;
}

// To nearest, half to even; NaN stays NaN.
template <class T> __device__ __forceinline__ T narrow(float v);
template <> __device__ __forceinline__ float narrow(float v) { return v; }
template <> __device__ __forceinline__ BFloat16 narrow(float v) {
  BFloat16 result;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
#else
  const uint32_t bits = __float_as_uint(v);
  result.bits = uint16_t(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return result;
}
template <> __device__ __forceinline__ Half narrow(float v) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(v));
  return result;
}

// Two values in a register, the first in its low half. With relu, max(value, 0) of each; NaN stays NaN.
template <class T> __device__ __forceinline__ float2 unpack(uint32_t v) {
  return {widen(T{uint16_t(v)}), widen(T{uint16_t(v >> 16)})};
}
template <> __device__ __forceinline__ float2 unpack<BFloat16>(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
template <class T, bool relu = false> __device__ __forceinline__ uint32_t pack(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t result;
  if (kIsBFloat16<T> && relu)
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else if (kIsBFloat16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else if (relu)
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  if (relu)
    low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;
  return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
#endif
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------

// c += A B for a warp, A of 16 x 16 values of T, B of 16 x 8, c of 16 x 8 floats. Lane 4 g + t has, in pairs of
// neighbours along the inner dimension, A[g][2 t..], A[g + 8][2 t..], A[g][2 t + 8..], A[g + 8][2 t + 8..]; B[2 t..][g],
// B[2 t + 8..][g]; c[g][2 t], c[g][2 t + 1], c[g + 8][2 t], c[g + 8][2 t + 1]. From sm_80 on.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if (kIsBFloat16<T>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// c += A B, A of 16 x 8 floats of which the lowest 13 bits are ignored, B of 8 x 8 likewise. Lane 4 g + t has A[g][t],
// A[g + 8][t], A[g][t + 4], A[g + 8][t + 4]; B[t][g], B[t + 4][g]; c as above. From sm_80 on.
__device__ __forceinline__ void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  __trap();
#endif
}

// Four 8 x 8 matrices of 16-bit values from shared memory; lane l gives the address of row l % 8 of matrix l / 8, a
// multiple of 16. Lane 4 g + t gets [g][2 t..] of matrix i in v[i]; transposed, [2 t..][g].
template <bool transposed = false>
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], const void *row) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(shared_address(row))
                 : "memory");
}

} // namespace hrpose::cuda
#endif

namespace hrpose::cuda {

template <class T> __host__ __device__ constexpr T ceil_div(T a, T b) { return (a + b - 1) / b; }

// body(a value of the type), to be used for its type.
template <class Body> const char *with_type(Type type, const Body &body) {
  switch (type) {
  case Type::bfloat16: return body(BFloat16());
  case Type::float16: return body(Half());
  default: return body(float());
  }
}

// The values of 16 bytes as floats, and back.
template <class T> constexpr int kPerLoad = 16 / sizeof(T);
template <class T> __device__ __forceinline__ void widen(uint4 from, float (&to)[kPerLoad<T>]) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4) {
      to[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack<T>(words[i]);
      to[2 * i] = pair.x, to[2 * i + 1] = pair.y;
    }
}
template <class T> __device__ __forceinline__ uint4 narrow(const float (&from)[kPerLoad<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(from[i]);
    else
      words[i] = pack<T>(from[2 * i], from[2 * i + 1]);
  return {words[0], words[1], words[2], words[3]};
}

} // namespace hrpose::cuda
