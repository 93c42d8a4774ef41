// Runs CUDA kernels on a CPU, compiled by g++ from the very .cu files that nvcc compiles: a proof of function where there
// is no GPU. It stands in for cuda_runtime.h and for the first half of csrc/cuda/device.h, which includes it.
//
// Every thread of a block is a fiber, all of them on one OS thread, one block after the other. A fiber runs until it
// waits for others: at a barrier, or in a warp collective. Which fiber goes next is the schedule: forward, reverse, or
// random by seed. A missing barrier thus shows as another result under some schedule, or as one of the NaNs that shared
// memory is filled with before every block. What a GPU would answer with a hang or undefined results is an error message
// of the launch: a deadlock, lanes of a mask that meet at different collectives, a mask that names an exited lane,
// __syncthreads at different lines, a misaligned access of load16, store16 and the like, an impossible launch. Copies
// of copy_async arrive when they are waited for, and leave NaNs until then.
//
// It knows nothing of time, of memory weaker than the host's, of bank conflicts, or of blocks that run side by side.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__) || !defined(__linux__)
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

typedef struct CUstream_st *cudaStream_t;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  kAttributes
};

// Of the running thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

constexpr size_t kStack = 256 << 10; // bytes, of which one page guards the end
constexpr size_t kPage = 4096;
constexpr int kPayload = 32; // bytes that a lane brings to a collective at most
constexpr unsigned kAllLanes = 0xffffffffu;

struct Context {
#if defined(__x86_64__) && defined(__linux__)
  void *stack_pointer;
#else
  ucontext_t registers;
#endif
  const void *stack = nullptr; // for the sanitizer
  size_t size = 0;
};

struct Copy {
  void *to;
  const void *from; // null for zeros
};

struct Fiber {
  Context context;
  char *stack = nullptr;
  uint3 thread;
  unsigned index, lane, warp;
  bool done;
  // It waits while *generation == seen; null if it does not.
  const uint64_t *generation;
  uint64_t seen;
  const char *where;
  int line;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

// Of the lanes `mask` of a warp. Two generations of slots: lanes may still read those of the last meeting.
struct Meeting {
  unsigned mask;
  int arrived = 0, line = 0;
  uint64_t generation = 0;
  const char *where = nullptr;
  alignas(16) unsigned char slots[2][32][kPayload];
};

struct Warp {
  unsigned exited = 0;
  std::vector<std::unique_ptr<Meeting>> meetings;
};

struct Shared {
  const void *key;
  void *memory;
  size_t bytes;
};

struct Machine {
  char schedule = 'f'; // f(orward), r(everse), s(huffled)
  uint64_t seed = 1;
  int attributes[kAttributes] = {132, 227 << 10, 9, 0};

  Context host;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber *running = nullptr;
  std::string error;
  void (*body)(const void *);
  const void *kernel;

  std::vector<Warp> warps;
  std::vector<Shared> shared; // key null: the dynamic one
  unsigned threads, alive, at_barrier;
  uint64_t barrier;
  int barrier_line;
  uint64_t blocks = 0;               // that have been started
  void (*at_block_end)() = nullptr; // called once all threads have left
} inline machine;

// ---- fibers ----------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && defined(__linux__)
// Saves what a function may not change on the stack that is left. swapcontext would call the kernel, at 20 times the cost.
__attribute__((naked, noinline)) inline void switch_stack(void **, void *) {
  __asm__("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
          "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
          "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void switch_registers(Context &from, Context &to) { switch_stack(&from.stack_pointer, to.stack_pointer); }
inline void prepare(Context &context, char *stack, void (*entry)()) {
  void **top = reinterpret_cast<void **>(stack + kStack);
  *--top = nullptr; // where `entry` would return to; it also aligns the stack as a call does
  *--top = reinterpret_cast<void *>(entry);
  for (int i = 0; i < 6; ++i)
    *--top = nullptr;
  context.stack_pointer = top;
}
#else
inline void switch_registers(Context &from, Context &to) { swapcontext(&from.registers, &to.registers); }
inline void prepare(Context &context, char *stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = kStack;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}
#endif

inline void switch_to(Context &from, Context &to) {
#ifdef __SANITIZE_ADDRESS__
  void *fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, to.stack, to.size);
#endif
  switch_registers(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

// Back to the loop in run_block. On an error it never resumes, and what is on the fibers' stacks is forgotten.
inline void leave() { switch_to(machine.running->context, machine.host); }

inline void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
inline void fail(const char *format, ...) {
  char text[256];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  machine.error = text;
  if (machine.running) {
    const unsigned block[3] = {blockIdx.x, blockIdx.y, blockIdx.z};
    snprintf(text, sizeof text, ", in thread %u of block (%u, %u, %u)", machine.running->index, block[0], block[1],
             block[2]);
    machine.error += text;
    leave();
  }
}

inline void wait(const uint64_t &generation, const char *where, int line) {
  Fiber &fiber = *machine.running;
  fiber.generation = &generation, fiber.seen = generation, fiber.where = where, fiber.line = line;
  leave();
}

inline void release_barrier() {
  if (machine.at_barrier && machine.at_barrier == machine.alive)
    machine.at_barrier = 0, ++machine.barrier;
}

inline void enter() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &machine.host.stack, &machine.host.size);
#endif
  machine.body(machine.kernel);
  Fiber &fiber = *machine.running;
  fiber.done = true;
  machine.warps[fiber.warp].exited |= 1u << fiber.lane;
  --machine.alive; // those that have left do not hold up a barrier
  release_barrier();
  leave();
}

// ---- a launch --------------------------------------------------------------------------------------------------------

inline unsigned random_below(uint64_t &state, unsigned n) {
  state ^= state << 13, state ^= state >> 7, state ^= state << 17; // xorshift, of Marsaglia
  return unsigned((state >> 32) * n >> 32);
}

inline void arrange(std::vector<unsigned> &order, uint64_t &state) {
  if (machine.schedule == 's')
    for (unsigned i = unsigned(order.size()); i > 1; --i)
      std::swap(order[i - 1], order[random_below(state, i)]);
}

inline std::vector<unsigned> first_order(unsigned count, uint64_t &state) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i)
    order[i] = machine.schedule == 'r' ? count - 1 - i : i;
  arrange(order, state);
  return order;
}

inline void *shared_memory(const void *key, size_t bytes) {
  for (const Shared &one : machine.shared)
    if (one.key == key)
      return one.memory;
  void *memory = nullptr; // of exactly this size, so that the sanitizer sees its end
  if (posix_memalign(&memory, 128, bytes ? bytes : 1))
    fail("no memory");
  memset(memory, 0xff, bytes); // NaN in every type
  machine.shared.push_back({key, memory, bytes});
  return memory;
}

inline void start(unsigned i) {
  Fiber &fiber = *machine.fibers[i];
  fiber.index = i, fiber.lane = i % 32, fiber.warp = i / 32;
  fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  fiber.done = false, fiber.generation = nullptr;
  fiber.open.clear(), fiber.groups.clear();
  if (!fiber.stack) {
    void *pages = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
      return fail("no memory for %u threads", machine.threads);
    mprotect(pages, kPage, PROT_NONE);
    fiber.stack = static_cast<char *>(pages) + kPage;
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStack); // of a thread that never came to its end
#endif
  fiber.context.stack = fiber.stack, fiber.context.size = kStack;
  prepare(fiber.context, fiber.stack, enter);
}

inline void report_deadlock() {
  std::string text = "deadlock";
  char line[96];
  int shown = 0;
  for (unsigned i = 0; i < machine.threads && shown < 4; ++i)
    if (const Fiber &fiber = *machine.fibers[i]; !fiber.done) {
      snprintf(line, sizeof line, "%s thread %u waits at %s in line %d", shown++ ? "," : ":", i, fiber.where, fiber.line);
      text += line;
    }
  machine.error = text;
}

inline void run_block(size_t shared_bytes, uint64_t &state) {
  ++machine.blocks, machine.at_block_end = nullptr;
  machine.threads = machine.alive = blockDim.x * blockDim.y * blockDim.z;
  machine.at_barrier = 0, machine.barrier = 0;
  machine.warps.clear();
  machine.warps.resize((machine.threads + 31) / 32);
  while (machine.fibers.size() < machine.threads)
    machine.fibers.emplace_back(new Fiber);
  for (unsigned i = 0; i < machine.threads; ++i)
    start(i);
  shared_memory(nullptr, shared_bytes);

  std::vector<unsigned> order = first_order(machine.threads, state);
  while (machine.alive && machine.error.empty()) {
    bool progress = false;
    for (const unsigned i : order) {
      Fiber &fiber = *machine.fibers[i];
      if (fiber.done || (fiber.generation && *fiber.generation == fiber.seen))
        continue;
      fiber.generation = nullptr;
      machine.running = &fiber, threadIdx = fiber.thread;
      switch_to(machine.host, fiber.context);
      machine.running = nullptr;
      progress = true;
      if (!machine.error.empty())
        break;
    }
    if (!progress)
      report_deadlock();
    arrange(order, state);
  }
  if (machine.at_block_end && machine.error.empty())
    machine.at_block_end();
  for (const Shared &one : machine.shared)
    free(one.memory);
  machine.shared.clear();
}

inline const char *run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void *), const void *kernel) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, threads = uint64_t(block.x) * block.y * block.z;
  machine.error.clear();
  if (!blocks || !threads || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 || threads > 1024 || block.z > 64 ||
      shared_bytes > size_t(machine.attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin])) {
    fail("invalid launch: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory", grid.x, grid.y, grid.z,
         block.x, block.y, block.z, shared_bytes);
    return machine.error.c_str();
  }
  machine.body = body, machine.kernel = kernel;
  gridDim = grid, blockDim = block;
  uint64_t state = machine.seed * 0x9e3779b97f4a7c15u | 1;
  for (const unsigned i : first_order(unsigned(blocks), state)) {
    blockIdx = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block(shared_bytes, state);
    if (!machine.error.empty())
      return machine.error.c_str();
  }
  return nullptr;
}

// ---- where threads meet ----------------------------------------------------------------------------------------------

struct Slots {
  unsigned char (*values)[kPayload];
  template <class T> T of(unsigned lane) const {
    T value;
    memcpy(&value, values[lane], sizeof value);
    return value;
  }
};

// The lanes of `mask` bring a value each and then see all of them.
template <class T> Slots meet(unsigned mask, const T &value, const char *where, int line) {
  static_assert(sizeof(T) <= kPayload, "more than a lane can bring");
  Fiber &fiber = *machine.running;
  Warp &warp = machine.warps[fiber.warp];
  const unsigned lanes = std::min(32u, machine.threads - fiber.warp * 32);
  if (mask == kAllLanes && lanes < 32)
    mask = (1u << lanes) - 1; // lanes that a narrow block never had are not missed
  if (!(mask >> fiber.lane & 1))
    fail("%s in line %d by a lane that its mask does not name", where, line);
  if (lanes < 32 && mask >> lanes)
    fail("%s in line %d names lanes that the block does not have", where, line);
  if (mask & warp.exited)
    fail("%s in line %d waits for a lane that has exited", where, line);

  Meeting *meeting = nullptr;
  for (const auto &one : warp.meetings)
    if (one->mask == mask)
      meeting = one.get();
  if (!meeting) {
    warp.meetings.emplace_back(meeting = new Meeting);
    meeting->mask = mask;
  }
  if (!meeting->arrived)
    meeting->where = where, meeting->line = line;
  else if (meeting->line != line || strcmp(meeting->where, where))
    fail("%s in line %d meets %s in line %d", where, line, meeting->where, meeting->line);
  const Slots slots{meeting->slots[meeting->generation % 2]};
  memcpy(slots.values[fiber.lane], &value, sizeof value);
  if (++meeting->arrived == __builtin_popcount(mask))
    meeting->arrived = 0, ++meeting->generation;
  else
    wait(meeting->generation, where, line);
  return slots;
}

template <class T> T shuffle(unsigned mask, T value, int from, int width, const char *where, int line) {
  const unsigned lane = machine.running->lane;
  const Slots slots = meet(mask, value, where, line);
  if (from < 0 || from / width != int(lane) / width)
    return value; // out of its segment
  if (!(mask >> from & 1) || unsigned(from) >= machine.threads - machine.running->warp * 32)
    fail("%s in line %d reads lane %d, which is not there", where, line, from);
  return slots.of<T>(unsigned(from));
}

inline unsigned vote(unsigned mask, bool value, const char *where, int line) {
  const Slots slots = meet(mask, value, where, line);
  unsigned result = 0;
  const unsigned lanes = std::min(32u, machine.threads - machine.running->warp * 32);
  for (unsigned lane = 0; lane < lanes; ++lane)
    if (mask >> lane & 1)
      result |= unsigned(slots.of<bool>(lane)) << lane;
  return result;
}

inline void aligned(const void *p, const char *where) {
  if (reinterpret_cast<uintptr_t>(p) % 16)
    fail("misaligned address in %s", where);
}

} // namespace simt

#define SIMT_LINE int line = __builtin_LINE()

inline void __syncthreads(SIMT_LINE) {
  simt::Machine &m = simt::machine;
  if (m.at_barrier && m.barrier_line != line)
    simt::fail("__syncthreads in line %d meets __syncthreads in line %d", line, m.barrier_line);
  m.barrier_line = line;
  const uint64_t before = m.barrier;
  ++m.at_barrier;
  simt::release_barrier();
  if (m.barrier == before)
    simt::wait(m.barrier, "__syncthreads", line);
}
inline void __syncwarp(unsigned mask = simt::kAllLanes, SIMT_LINE) { simt::meet(mask, 0, "__syncwarp", line); }

template <class T> T __shfl_sync(unsigned mask, T value, int lane, int width = 32, SIMT_LINE) {
  const int base = int(simt::machine.running->lane) / width * width;
  return simt::shuffle(mask, value, base + (lane & (width - 1)), width, "__shfl_sync", line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, SIMT_LINE) {
  return simt::shuffle(mask, value, int(simt::machine.running->lane) ^ flip, width, "__shfl_xor_sync", line);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, int by, int width = 32, SIMT_LINE) {
  return simt::shuffle(mask, value, int(simt::machine.running->lane) + by, width, "__shfl_down_sync", line);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, int by, int width = 32, SIMT_LINE) {
  return simt::shuffle(mask, value, int(simt::machine.running->lane) - by, width, "__shfl_up_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, bool value, SIMT_LINE) {
  return simt::vote(mask, value, "__ballot_sync", line);
}
inline bool __any_sync(unsigned mask, bool value, SIMT_LINE) { return simt::vote(mask, value, "__any_sync", line); }
inline bool __all_sync(unsigned mask, bool value, SIMT_LINE) { return !simt::vote(mask, !value, "__all_sync", line); }

// ---- functions of CUDA -----------------------------------------------------------------------------------------------

using std::max;
using std::min;

inline float __int_as_float(int v) {
  float result;
  memcpy(&result, &v, 4);
  return result;
}
inline float __uint_as_float(unsigned v) { return __int_as_float(int(v)); }
inline unsigned __float_as_uint(float v) {
  unsigned result;
  memcpy(&result, &v, 4);
  return result;
}
inline int __float_as_int(float v) { return int(__float_as_uint(v)); }
template <class T> T __ldg(const T *p) { return *p; }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline void __threadfence() {}

namespace hrpose::cuda {

// ---- as in csrc/cuda/device.h ----------------------------------------------------------------------------------------

inline const char *device_attribute(cudaDeviceAttr attribute, int *value) {
  *value = simt::machine.attributes[attribute];
  return nullptr;
}

struct Launch {
  dim3 grid, block;
  cudaStream_t stream;
  size_t shared_bytes = 0;
  bool overlap = false;
};

template <class... Params, class... Args>
const char *launch(const Launch &config, void (*kernel)(Params...), Args... args) {
  const auto call = [=] { kernel(args...); };
  const auto body = [](const void *callable) { (*static_cast<decltype(call) *>(callable))(); };
  return simt::run_grid(config.grid, config.block, config.shared_bytes, body, &call);
}

template <class T> T &shared() {
  static const char key = 0;
  return *static_cast<T *>(simt::shared_memory(&key, sizeof(T)));
}
inline unsigned char *dynamic_shared() { return static_cast<unsigned char *>(simt::shared_memory(nullptr, 0)); }

inline void copy_async(void *to, const void *from, bool valid = true) {
  simt::aligned(to, "copy_async"), simt::aligned(from, "copy_async");
  memset(to, 0xff, 16);
  simt::machine.running->open.push_back({to, valid ? from : nullptr});
}
inline void commit_copies() {
  simt::Fiber &fiber = *simt::machine.running;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}
template <int n> void wait_copies() {
  std::vector<std::vector<simt::Copy>> &groups = simt::machine.running->groups;
  for (; groups.size() > n; groups.erase(groups.begin()))
    for (const simt::Copy &copy : groups.front())
      copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
}

inline uint4 load16(const void *p) {
  simt::aligned(p, "load16");
  return *static_cast<const uint4 *>(p);
}
inline void store16(void *p, uint4 v) {
  simt::aligned(p, "store16");
  *static_cast<uint4 *>(p) = v;
}
inline uint4 load16_once(const void *p) { return load16(p); }
inline void prefetch(const void *) {}
inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

inline float widen(float v) { return v; }
inline float widen(BFloat16 v) { return __uint_as_float(uint32_t(v.bits) << 16); }
inline float widen(Half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float size = exponent ? ldexpf(float(1024 + fraction), exponent - 25) : ldexpf(float(fraction), -24);
  if (exponent == 31)
    size = fraction ? NAN : INFINITY;
  return v.bits >> 15 ? -size : size;
}
template <class T> T narrow(float v);
template <> inline float narrow(float v) { return v; }
template <> inline BFloat16 narrow(float v) {
  const uint32_t bits = __float_as_uint(v);
  return {uint16_t(v != v ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline Half narrow(float v) {
  const unsigned sign = std::signbit(v) ? 0x8000 : 0;
  const float size = fabsf(v);
  if (!(size < 65520)) // halfway to the first power of two that does not fit
    return {uint16_t(sign | (v != v ? 0x7fff : 0x7c00))};
  const int exponent = size < ldexpf(1, -14) ? -14 : ilogbf(size);
  return {uint16_t(sign | ((exponent + 14) * 1024 + int(nearbyintf(ldexpf(size, 10 - exponent)))))};
}
template <class T> float2 unpack(uint32_t v) { return {widen(T{uint16_t(v)}), widen(T{uint16_t(v >> 16)})}; }
template <class T, bool relu = false> uint32_t pack(float low, float high) {
  if (relu)
    low = low < 0 ? 0 : low, high = high < 0 ? 0 : high;
  return narrow<T>(low).bits | uint32_t(narrow<T>(high).bits) << 16;
}

struct Operands {
  uint32_t a[4], b[2];
};

template <class T>
void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, SIMT_LINE) {
  const simt::Slots slots = simt::meet(simt::kAllLanes, Operands{{a0, a1, a2, a3}, {b0, b1}}, "mma", line);
  const unsigned lane = simt::machine.running->lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 8; ++k) { // pairs of the inner dimension
      const float2 a = unpack<T>(slots.of<Operands>(4 * g + k % 4).a[i / 2 + k / 4 * 2]);
      const float2 b = unpack<T>(slots.of<Operands>(4 * (2 * t + i % 2) + k % 4).b[k / 4]);
      c[i] += a.x * b.x;
      c[i] += a.y * b.y;
    }
}

inline void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                     SIMT_LINE) {
  const simt::Slots slots = simt::meet(simt::kAllLanes, Operands{{a0, a1, a2, a3}, {b0, b1}}, "mma_tf32", line);
  const unsigned lane = simt::machine.running->lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i)
    for (unsigned k = 0; k < 8; ++k) {
      const uint32_t a = slots.of<Operands>(4 * g + k % 4).a[i / 2 + k / 4 * 2];
      const uint32_t b = slots.of<Operands>(4 * (2 * t + i % 2) + k % 4).b[k / 4];
      c[i] += __uint_as_float(a & 0xffffe000u) * __uint_as_float(b & 0xffffe000u);
    }
}

struct Row {
  uint16_t values[8];
};

template <bool transposed = false> void load_matrices(uint32_t (&v)[4], const void *row, SIMT_LINE) {
  simt::aligned(row, "load_matrices");
  Row own;
  memcpy(&own, row, sizeof own);
  const simt::Slots slots = simt::meet(simt::kAllLanes, own, "load_matrices", line);
  const unsigned lane = simt::machine.running->lane, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const auto value = [&](unsigned y, unsigned x) { return uint32_t(slots.of<Row>(8 * i + y).values[x]); };
    v[i] = transposed ? value(2 * t, g) | value(2 * t + 1, g) << 16 : value(g, 2 * t) | value(g, 2 * t + 1) << 16;
  }
}

} // namespace hrpose::cuda

// Gives back the threads' stacks until the next launch: a process may have 65530 mappings, and each stack is two.
extern "C" __attribute__((used, visibility("default"))) inline void simt_release() {
  for (const auto &fiber : simt::machine.fibers)
    if (fiber->stack) {
#ifdef __SANITIZE_ADDRESS__
      ASAN_UNPOISON_MEMORY_REGION(fiber->stack, simt::kStack); // whoever gets these addresses next may use them
#endif
      munmap(fiber->stack - simt::kPage, simt::kPage + simt::kStack);
      fiber->stack = nullptr;
    }
}

// schedule: forward, reverse or shuffled. multiprocessors: what device_attribute says of the card.
extern "C" __attribute__((used, visibility("default"))) inline void simt_configure(const char *schedule, uint64_t seed, int multiprocessors) {
  simt::machine.schedule = *schedule;
  simt::machine.seed = seed;
  simt::machine.attributes[cudaDevAttrMultiProcessorCount] = multiprocessors;
}
