"""The emulator itself: what it computes is what CUDA's documentation says, and it reports what a GPU would not."""

import pytest
import torch

KERNELS = """
#include "device.h"
namespace hrpose::cuda {

struct Values {
  float v[96];
};
__global__ void __launch_bounds__(96) reverse_kernel(const float *in, float *out, int barrier) {
  Values &values = shared<Values>();
  values.v[threadIdx.x] = in[blockIdx.x * 96 + threadIdx.x];
  if (barrier)
    __syncthreads();
  out[blockIdx.x * 96 + threadIdx.x] = values.v[95 - threadIdx.x];
}

__global__ void copy_kernel(const float *in, float *out, int wait, int valid) {
  float *values = reinterpret_cast<float *>(dynamic_shared());
  copy_async(values + 4 * threadIdx.x, in + 4 * threadIdx.x, valid > int(threadIdx.x));
  commit_copies();
  copy_async(values + 128 + 4 * threadIdx.x, in + 4 * threadIdx.x);
  commit_copies();
  wait ? wait_copies<1>() : wait_copies<2>();
  __syncwarp();
  for (int i = 0; i < 8; ++i)
    out[32 * i + threadIdx.x] = values[32 * i + threadIdx.x];
}

__global__ void warp_kernel(int *out) {
  const int lane = threadIdx.x % 32;
  out += 8 * threadIdx.x;
  out[0] = __shfl_sync(~0u, lane * lane, lane + 1);
  out[1] = __shfl_xor_sync(~0u, lane, 5);
  out[2] = __shfl_down_sync(~0u, lane, 3);
  out[3] = __shfl_up_sync(~0u, lane, 3, 8);
  out[4] = int(__ballot_sync(~0u, lane % 3 == 0));
  out[5] = __any_sync(~0u, lane == 7) * 2 + __all_sync(~0u, lane < 7);
  out[6] = lane < 8 ? __shfl_sync(0xffu, lane, 3) : __shfl_sync(0xffffff00u, lane, 9);
  out[7] = threadIdx.x + 100 * threadIdx.y + 1000 * threadIdx.z;
}

__global__ void broken_kernel(int kind) {
  const int lane = threadIdx.x;
  if (kind == 0 && lane % 2)
    __syncthreads();
  else if (kind == 0)
    __syncwarp(0x55555555u), __shfl_sync(~0u, lane, 0);
  if (kind == 1)
    lane < 16 ? __syncwarp() : (void)__ballot_sync(~0u, 1);
  if (kind == 2 && lane > 3)
    __syncwarp();
  if (kind == 3)
    lane < 16 ? __syncthreads() :
      __syncthreads();
  if (kind == 4)
    __syncwarp(1u << (lane + 1) % 32);
  if (kind == 5)
    load16(dynamic_shared() + 4);
  if (kind == 6 && lane < 16)
    __shfl_sync(0xffffu, lane, 20);
}

template <class T> __global__ void mma_kernel(const T *a, const T *b, float *c) {
  T *rows = reinterpret_cast<T *>(dynamic_shared()); // 16 x 16 of a, 16 x 8 of b
  for (int i = threadIdx.x; i < 256; i += 32)
    rows[i] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32)
    rows[256 + i] = b[i];
  __syncwarp();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t x[4], y[4];
  load_matrices(x, rows + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<true>(y, rows + 256 + lane % 16 * 8);
  float sum[4] = {1, 2, 3, 4};
  mma<T>(sum, x[0], x[1], x[2], x[3], y[0], y[1]);
  for (int i = 0; i < 4; ++i)
    c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

__global__ void mma_tf32_kernel(const uint32_t *a, const uint32_t *b, float *c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  float sum[4] = {1, 2, 3, 4};
  mma_tf32(sum, a[g * 8 + t], a[(g + 8) * 8 + t], a[g * 8 + t + 4], a[(g + 8) * 8 + t + 4], b[t * 8 + g],
           b[(t + 4) * 8 + g]);
  for (int i = 0; i < 4; ++i)
    c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T> __global__ void convert_kernel(const float *in, T *out, float *back) {
  out[threadIdx.x] = narrow<T>(in[threadIdx.x]);
  back[threadIdx.x] = widen(out[threadIdx.x]);
}

} // namespace hrpose::cuda
"""
SHIM = """
using namespace hrpose::cuda;
extern "C" {
const char *reverse(const float *in, float *out, int64_t blocks, int64_t barrier) {
  return launch({dim3(blocks), dim3(96), nullptr}, reverse_kernel, in, out, int(barrier));
}
const char *copy(const float *in, float *out, int64_t wait, int64_t valid) {
  return launch({dim3(1), dim3(32), nullptr, 1024}, copy_kernel, in, out, int(wait), int(valid));
}
const char *warp(int *out, int64_t threads) { return launch({dim3(1), dim3(threads), nullptr}, warp_kernel, out); }
const char *broken(int64_t kind, int64_t blocks, int64_t threads, int64_t bytes) {
  return launch({dim3(blocks), dim3(threads), nullptr, size_t(bytes)}, broken_kernel, int(kind));
}
const char *mma_bf16(const BFloat16 *a, const BFloat16 *b, float *c) {
  return launch({dim3(1), dim3(32), nullptr, 768}, mma_kernel<BFloat16>, a, b, c);
}
const char *mma_half(const Half *a, const Half *b, float *c) {
  return launch({dim3(1), dim3(32), nullptr, 768}, mma_kernel<Half>, a, b, c);
}
const char *mma_float(const uint32_t *a, const uint32_t *b, float *c) {
  return launch({dim3(1), dim3(32), nullptr}, mma_tf32_kernel, a, b, c);
}
const char *to_bf16(const float *in, BFloat16 *out, float *back, int64_t n) {
  return launch({dim3(1), dim3(n), nullptr}, convert_kernel<BFloat16>, in, out, back);
}
const char *to_half(const float *in, Half *out, float *back, int64_t n) {
  return launch({dim3(1), dim3(n), nullptr}, convert_kernel<Half>, in, out, back);
}
}
"""


@pytest.fixture(scope="module")
def emulator(emulate):
    return emulate(KERNELS, SHIM)


def test_barriers_are_needed(emulator, schedule):
    values, out = torch.arange(288.0), torch.empty(288)
    emulator.configure(schedule)
    emulator("reverse", values, out, 3, True)
    assert torch.equal(out.view(3, 96), values.view(3, 96).flip(1))
    emulator("reverse", values, out, 3, False)  # shared memory is NaN at the start of every block
    assert all(part.isnan().any() for part in out.view(3, 96))


def test_copies_arrive_when_waited_for(emulator, schedule):
    values, out = torch.arange(128.0), torch.empty(256)
    emulator.configure(schedule)
    emulator("copy", values, out, True, 30)
    assert torch.equal(out[:128], values * (values < 120)) and out[128:].isnan().all()
    emulator("copy", values, out, False, 32)
    assert out.isnan().all()


def test_warp_collectives(emulator, schedule):
    out = torch.empty(32, 8, dtype=torch.int32)
    emulator.configure(schedule)
    emulator("warp", out, 32)
    for lane in range(32):
        assert out[lane].tolist() == [
            ((lane + 1) % 32) ** 2,
            lane ^ 5,
            lane + 3 if lane < 29 else lane,
            lane - 3 if lane % 8 >= 3 else lane,
            sum(1 << i for i in range(0, 32, 3)),
            2,
            3 if lane < 8 else 9,
            lane,
        ]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (0, "deadlock: thread 0 waits at __shfl_sync in line .*, thread 1 waits at __syncthreads in line"),
        (1, "__ballot_sync in line .* meets __syncwarp|__syncwarp in line .* meets __ballot_sync"),
        (2, "__syncwarp in line .* waits for a lane that has exited|deadlock: thread .* waits at __syncwarp"),
        (3, "__syncthreads in line .* meets __syncthreads in line"),
        (4, "__syncwarp in line .* by a lane that its mask does not name"),
        (5, "misaligned address in load16"),
        (6, "__shfl_sync in line .* reads lane 20, which is not there"),
    ],
)
def test_what_a_gpu_would_not_report(emulator, emulation_error, schedule, kind, message):
    emulator.configure(schedule)
    with pytest.raises(emulation_error, match=message):
        emulator("broken", kind, 1, 32, 64)
    emulator("broken", -1, 1, 32, 64)  # and goes on


def test_impossible_launches(emulator, emulation_error):
    for blocks, threads, shared_bytes in ((0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, (227 << 10) + 1)):
        with pytest.raises(emulation_error, match="invalid launch"):
            emulator("broken", -1, blocks, threads, shared_bytes)


@pytest.mark.parametrize(("name", "dtype"), [("mma_bf16", torch.bfloat16), ("mma_half", torch.float16)])
def test_tensor_core_products(emulator, schedule, name, dtype):
    a, b, c = torch.randint(-8, 9, (16, 16)), torch.randint(-8, 9, (16, 8)), torch.empty(16, 8)
    emulator.configure(schedule)
    emulator(name, a.to(dtype), b.to(dtype), c)
    start = torch.tensor([[1.0, 2], [3, 4]]).repeat_interleave(8, 0).repeat(1, 4)
    assert torch.equal(c, start + (a @ b).float())


def test_tensor_core_products_of_tf32(emulator):
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    emulator("mma_float", a, b, c)
    a, b = ((m.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for m in (a, b))
    start = torch.tensor([[1.0, 2], [3, 4]]).repeat_interleave(8, 0).repeat(1, 4)
    torch.testing.assert_close(c.double(), start + a @ b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [("to_bf16", torch.bfloat16), ("to_half", torch.float16)])
def test_conversions(emulator, name, dtype):
    """Every value of the type, the halves between two of them, and what lies beside those."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    exact = bits.view(dtype).float()
    exact = exact[exact.isfinite()].sort().values
    halves = (exact[1:].double() + exact[:-1].double()).div(2).float()
    beside = [torch.nextafter(halves, torch.full_like(halves, way)) for way in (-torch.inf, torch.inf)]
    values = torch.cat((exact, halves, *beside, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38, 65519, 65520])))
    values = torch.nn.functional.pad(values, (0, -len(values) % 1024)).view(-1, 1024)
    for part in values[torch.randperm(len(values))[:40]]:
        out, back = torch.empty(1024, dtype=dtype), torch.empty(1024)
        emulator(name, part, out, back, 1024)
        torch.testing.assert_close(out, part.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)
