"""The emulator of hopper.h itself: what it computes is what the PTX ISA says, and it reports what a GPU would not."""

import pytest
import torch

KERNELS = """
#include "hopper.h"
namespace hrpose::cuda {

// How the weights come to shared memory: by copy_bulk, or by ordinary stores, published or not.
enum Way { kBulk, kPublished, kStored };

// c = 1 + a b, a of 64 x 16, b as it lies in shared memory.
template <class T, int kTiles>
__global__ void product_kernel(const T *a, const T *b, float *c, int way, int next_inputs, int next_outputs,
                               int bytes) {
  Arrival &arrival = *reinterpret_cast<Arrival *>(dynamic_shared() + bytes);
  T *weights = reinterpret_cast<T *>(dynamic_shared());
  if (threadIdx.x == 0 && way == kBulk)
    prepare(arrival), announce(), copy_bulk(weights, b, bytes, arrival);
  for (int i = threadIdx.x; i < bytes / 2 && way != kBulk; i += kWarpgroup)
    weights[i] = b[i];
  if (way == kPublished)
    publish_stores();
  __syncthreads();
  if (way == kBulk)
    wait_for(arrival);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = 16 * warp + lane / 4, column = lane % 4 * 2;
  float sums[kTiles][4];
  for (auto &tile : sums)
    for (float &sum : tile)
      sum = 1;
  const auto word = [&](int i) {
    const T *pair = a + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
    return pair[0].bits | uint32_t(pair[1].bits) << 16;
  };
  uint32_t words[4] = {word(0), word(1), word(2), word(3)};
  hold(sums), hold(words);
  fence_products();
  multiply_group<T>(sums, words, descriptor(weights, next_inputs, next_outputs));
  commit_products();
  wait_products<0>();
  hold(sums);
  for (int i = 0; i < 4 * kTiles; ++i)
    c[(row + i % 4 / 2 * 8) * 8 * kTiles + i / 4 * 8 + column + i % 2] = sums[i / 4][i % 4];
}

__global__ void broken_kernel(const uint16_t *from, float *out, int kind) {
  Arrival *arrivals = reinterpret_cast<Arrival *>(dynamic_shared() + 1024);
  if (threadIdx.x == 0) {
    prepare(arrivals[0]);
    if (kind != 1)
      announce();
    copy_bulk(dynamic_shared(), from, kind == 2 ? 2048 : kind == 3 ? 40 : 1024, arrivals[kind == 4]);
    if (kind == 5)
      copy_bulk(dynamic_shared(), from, 16, arrivals[0]);
  }
  __syncthreads();
  if (kind != 6 && kind != 7)
    wait_for(arrivals[kind == 8]);
  if (kind == 7)
    return;
  float sums[4][4] = {};
  uint32_t words[4] = {};
  if (kind != 9)
    fence_products();
  const bool second = threadIdx.x / 32 == 1;
  const int offset = kind == 10 && second ? 16 : 0;
  const uint64_t swizzled = uint64_t(kind == 11) << 62, b = descriptor(dynamic_shared() + offset, 512, 128) | swizzled;
  if (kind == 12 && second)
    __syncwarp();
  else
    multiply_group<BFloat16>(sums, words, advance(b, kind == 13 ? 4096 : 0));
  commit_products();
  kind == 14 ? wait_products<1>() : wait_products<0>();
  out[threadIdx.x] = sums[0][0];
}

} // namespace hrpose::cuda
"""
SHIM = """
using namespace hrpose::cuda;
extern "C" {
#define PRODUCT(name, T, tiles) \\
  const char *name(const T *a, const T *b, float *c, int64_t way, int64_t ins, int64_t outs, int64_t bytes) { \\
    return launch({dim3(1), dim3(128), nullptr, size_t(bytes) + 8}, product_kernel<T, tiles>, a, b, c, int(way), \\
                  int(ins), int(outs), int(bytes)); \\
  }
PRODUCT(bf16_32, BFloat16, 4)
PRODUCT(half_64, Half, 8)
const char *broken(const uint16_t *from, float *out, int64_t kind, int64_t threads) {
  return launch({dim3(1), dim3(threads), nullptr, 1040}, broken_kernel, from, out, int(kind));
}
}
"""
BULK, PUBLISHED, STORED = range(3)


@pytest.fixture(scope="module")
def emulator(emulate):
    return emulate(KERNELS, SHIM)


def in_core_matrices(b, next_inputs, next_outputs):
    """b (16 inputs, outputs) as values in shared memory, NaN where there are none."""
    inputs, outputs = b.shape
    last = (inputs // 8 - 1) * next_inputs + (outputs // 8 - 1) * next_outputs
    memory = torch.full(((last + 128) // 2,), torch.nan, dtype=b.dtype)
    for k in range(inputs):
        for n in range(outputs):
            place = k // 8 * next_inputs + n // 8 * next_outputs + n % 8 * 16 + k % 8 * 2
            memory[place // 2] = b[k, n]
    return memory


@pytest.mark.parametrize(
    ("name", "dtype", "outputs"), [("bf16_32", torch.bfloat16, 32), ("half_64", torch.float16, 64)]
)
@pytest.mark.parametrize("way", [BULK, PUBLISHED])
@pytest.mark.parametrize("offsets", ["inputs apart", "outputs apart", "with gaps"])
def test_products(emulator, schedule, name, dtype, outputs, way, offsets):
    next_inputs, next_outputs = {
        "inputs apart": (16 * outputs, 128),
        "outputs apart": (128, 256),
        "with gaps": (144, 320),
    }[offsets]
    a, b = torch.randint(-8, 9, (64, 16)), torch.randint(-8, 9, (16, outputs))
    memory, c = in_core_matrices(b.to(dtype), next_inputs, next_outputs), torch.empty(64, outputs)
    emulator.configure(schedule)
    emulator(name, a.to(dtype), memory, c, way, next_inputs, next_outputs, 2 * len(memory))
    assert torch.equal(c, 1 + (a @ b).float())


def test_ordinary_stores_are_to_be_published(emulator, schedule):
    b, c = torch.ones(16, 32, dtype=torch.bfloat16), torch.empty(64, 32)
    emulator.configure(schedule)
    emulator(
        "bf16_32", torch.ones(64, 16, dtype=torch.bfloat16), in_core_matrices(b, 512, 128), c, STORED, 512, 128, 1024
    )
    assert c.isnan().all()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (1, "copy_bulk with an arrival that was not prepared and announced"),
        (2, "copy_bulk leaves dynamic shared memory"),
        (3, "copy_bulk of 40 bytes"),
        (4, "copy_bulk with an arrival that was not prepared and announced"),
        (5, "two copies with one arrival"),
        (6, "multiply_group reads what its thread has not waited for"),
        (7, "a block ended before copy_bulk brought its 1024 bytes"),
        (8, "wait_for in line .* of an arrival that was not prepared"),
        (9, "multiply_group in line .* without fence_products"),
        (10, "multiply_group in line .* meets another one"),
        (11, "multiply_group in line .* with a descriptor that is not emulated"),
        (12, "deadlock: .* waits at multiply_group|.* meets multiply_group|waits for a lane that has exited"),
        (13, "multiply_group reads beyond shared memory"),
    ],
)
def test_what_a_gpu_would_not_report(emulator, emulation_error, schedule, kind, message):
    from_, out = torch.zeros(1024, dtype=torch.bfloat16), torch.empty(128)
    emulator.configure(schedule)
    with pytest.raises(emulation_error, match=message):
        emulator("broken", from_, out, kind, 128)
    emulator("broken", from_, out, 0, 128)  # and goes on
    assert (out == 0).all()


def test_sums_are_not_there_before_they_are_waited_for(emulator, schedule):
    out = torch.empty(128)
    emulator.configure(schedule)
    emulator("broken", torch.zeros(512, dtype=torch.bfloat16), out, 14, 128)
    assert out.isnan().all()


def test_a_warpgroup_is_128_threads(emulator, emulation_error):
    with pytest.raises(emulation_error, match="by threads that are no whole warpgroup"):
        emulator("broken", torch.zeros(512, dtype=torch.bfloat16), torch.empty(128), 0, 64)
