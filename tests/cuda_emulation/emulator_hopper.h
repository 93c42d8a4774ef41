// Stands in for the second half of csrc/cuda/hopper.h, on top of emulator.h: the asynchronous proxy of compute
// capability 9.0, and products of a warpgroup.
//
// The proxy has its own view of dynamic shared memory, NaNs at the start of a block. copy_bulk writes to both views,
// once somebody waits for its arrival; an ordinary store is in the proxy's only after publish_stores(). Products read
// that view by decoding their descriptor as the PTX ISA defines it, whatever the host has packed, and only bytes of
// copies that the thread itself has waited for. They happen when they are waited for, with what their operands hold by
// then; sums are NaNs until then. Errors of the launch are: warps of a warpgroup that do not call the same products
// with the same descriptor, products without the fence, a descriptor with swizzling or beyond shared memory, an arrival
// that was not prepared or announced or is used twice, and a block that ends before its copies have come.
//
// It knows nothing of the order in which views become visible on a card but for that.
#pragma once
#include <map>
#include <set>

namespace simt {

constexpr uint64_t kPrepared = 0xa11a, kAnnounced = 0xa11b;
constexpr uint32_t kWindow = 1024; // address of dynamic shared memory: not 0, so that a missing base shows

struct BulkCopy {
  unsigned char *to;
  const void *from;
  size_t bytes;
  const void *arrival;
  bool come;
};

struct Product {
  float *sums;
  const uint32_t *a; // read when the product happens
  uint64_t descriptor;
  int tiles;
  float (*widen)(uint16_t);
};

struct HopperThread {
  bool fenced = false;
  std::set<const void *> arrivals; // that it has waited for
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  std::map<float *, std::vector<float>> sums; // of products that have not happened
};

struct GroupMeeting {
  unsigned arrived = 0;
  uint64_t generation = 0, descriptor = 0;
  int line = 0;
};

struct Hopper {
  uint64_t block = 0, copies_begun = 0;
  std::vector<unsigned char> proxy; // its view of dynamic shared memory
  std::vector<BulkCopy> copies;
  std::vector<uint64_t *> prepared;
  std::vector<HopperThread> threads;
  std::vector<GroupMeeting> groups;
} inline hopper;

inline const Shared &dynamic_memory() {
  for (const Shared &one : machine.shared)
    if (!one.key)
      return one;
  return machine.shared.front(); // not reached: every block has some, of 0 bytes perhaps
}

// That of the running block.
inline Hopper &hopper_state() {
  if (hopper.block != machine.blocks) {
    hopper = {};
    hopper.block = machine.blocks;
    hopper.proxy.assign(dynamic_memory().bytes, 0xff);
    hopper.threads.resize(machine.threads);
    hopper.groups.resize(machine.threads / 128);
    machine.at_block_end = [] {
      for (const BulkCopy &copy : hopper.copies)
        if (!copy.come)
          return fail("a block ended before copy_bulk brought its %zu bytes", copy.bytes);
    };
  }
  return hopper;
}
inline HopperThread &hopper_thread() { return hopper_state().threads[machine.running->index]; }

// Of `bytes` bytes in dynamic shared memory.
inline size_t offset_in_shared(const void *p, size_t bytes, const char *where) {
  const Shared &memory = dynamic_memory();
  const size_t offset = size_t(static_cast<const char *>(p) - static_cast<const char *>(memory.memory));
  if (offset > memory.bytes || bytes > memory.bytes - offset)
    fail("%s leaves dynamic shared memory", where);
  return offset;
}

// The 128 threads of a warpgroup, at the same product.
inline void meet_group(uint64_t descriptor, int line) {
  Hopper &state = hopper_state();
  const unsigned index = machine.running->index / 128;
  if (index >= state.groups.size())
    fail("multiply_group in line %d by threads that are no whole warpgroup", line);
  GroupMeeting &meeting = state.groups[index];
  if (!meeting.arrived)
    meeting.line = line, meeting.descriptor = descriptor;
  else if (meeting.line != line || meeting.descriptor != descriptor)
    fail("multiply_group in line %d meets another one, of line %d, in its warpgroup", line, meeting.line);
  if (++meeting.arrived == 128)
    meeting.arrived = 0, ++meeting.generation;
  else
    wait(meeting.generation, "multiply_group", line);
}

// Value (output, input) of a 16-input operand.
inline float weight(const Product &product, unsigned output, unsigned input) {
  const uint64_t d = product.descriptor;
  const size_t start = (d & 0x3fff) << 4, next_inputs = (d >> 16 & 0x3fff) << 4, next_outputs = (d >> 32 & 0x3fff) << 4;
  const size_t in_matrix = output % 8 * 16 + input % 8 * 2;
  const size_t place = start + output / 8 * next_outputs + input / 8 * next_inputs + in_matrix - kWindow;
  uint16_t bits;
  if (place >= hopper.proxy.size() || hopper.proxy.size() - place < sizeof bits)
    fail("multiply_group reads beyond shared memory");
  memcpy(&bits, &hopper.proxy[place], sizeof bits);
  return product.widen(bits);
}

// Has the thread waited for all bytes that it reads?
inline void check_arrivals(const Product &product) {
  const uint64_t d = product.descriptor;
  const auto *memory = static_cast<const unsigned char *>(dynamic_memory().memory);
  for (int i = 0; i < 2 * product.tiles; ++i) { // core matrices
    const size_t place = ((d & 0x3fff) << 4) + i / 2 * ((d >> 32 & 0x3fff) << 4) + i % 2 * ((d >> 16 & 0x3fff) << 4);
    const unsigned char *p = memory + place - kWindow;
    for (const BulkCopy &copy : hopper.copies)
      if (p < copy.to + copy.bytes && copy.to < p + 128 && !hopper_thread().arrivals.count(copy.arrival))
        fail("multiply_group reads what its thread has not waited for");
  }
}

inline void happen(const std::vector<Product> &products, int line) {
  // Lanes see each other's operands until all have done.
  const Slots slots = meet(kAllLanes, &products, "wait_products", line);
  HopperThread &thread = hopper_thread();
  const unsigned lane = machine.running->lane, g = lane / 4, t = lane % 4;
  for (size_t i = 0; i < products.size(); ++i) {
    const Product &product = products[i];
    float rows[2][16]; // of A: g and g + 8
    for (unsigned k = 0; k < 16; ++k) {
      const std::vector<Product> &other = *slots.of<const std::vector<Product> *>(4 * g + k % 8 / 2);
      for (unsigned r = 0; r < 2; ++r)
        rows[r][k] = product.widen(uint16_t(other[i].a[r + k / 8 * 2] >> k % 2 * 16));
    }
    std::vector<float> &sums = thread.sums[product.sums];
    for (unsigned j = 0; j < 4 * unsigned(product.tiles); ++j)
      for (unsigned k = 0; k < 16; ++k)
        sums[j] += rows[j % 4 / 2][k] * weight(product, j / 4 * 8 + 2 * t + j % 2, k);
  }
  meet(kAllLanes, 0, "wait_products", line);
}

} // namespace simt

namespace hrpose::cuda {

inline void prepare(Arrival &arrival) {
  simt::offset_in_shared(&arrival, sizeof arrival, "prepare");
  arrival.state = simt::kPrepared;
  simt::hopper_state().prepared.push_back(&arrival.state);
}
inline void announce() {
  for (uint64_t *state : simt::hopper_state().prepared)
    *state = simt::kAnnounced;
}

inline void copy_bulk(void *to, const void *from, int bytes, Arrival &arrival) {
  simt::Hopper &state = simt::hopper_state();
  simt::aligned(to, "copy_bulk"), simt::aligned(from, "copy_bulk");
  simt::offset_in_shared(to, size_t(bytes), "copy_bulk");
  if (bytes <= 0 || bytes % 16)
    simt::fail("copy_bulk of %d bytes", bytes);
  if (arrival.state != simt::kAnnounced)
    simt::fail("copy_bulk with an arrival that was not prepared and announced");
  for (const simt::BulkCopy &copy : state.copies)
    if (copy.arrival == &arrival)
      simt::fail("two copies with one arrival");
  state.copies.push_back({static_cast<unsigned char *>(to), from, size_t(bytes), &arrival, false});
  ++state.copies_begun;
}

inline void wait_for(Arrival &arrival, SIMT_LINE) {
  simt::Hopper &state = simt::hopper_state();
  if (arrival.state != simt::kAnnounced)
    simt::fail("wait_for in line %d of an arrival that was not prepared", line);
  for (;;) {
    for (simt::BulkCopy &copy : state.copies)
      if (copy.arrival == &arrival) {
        if (!copy.come) {
          memcpy(copy.to, copy.from, copy.bytes);
          memcpy(&state.proxy[simt::offset_in_shared(copy.to, copy.bytes, "copy_bulk")], copy.from, copy.bytes);
        }
        copy.come = true;
        simt::hopper_thread().arrivals.insert(&arrival);
        return;
      }
    simt::wait(state.copies_begun, "wait_for", line);
  }
}

inline void publish_stores() {
  std::vector<unsigned char> &proxy = simt::hopper_state().proxy;
  memcpy(proxy.data(), simt::dynamic_memory().memory, proxy.size());
}

inline uint64_t descriptor(const void *matrix, int next_inputs, int next_outputs) {
  const uint64_t place = simt::offset_in_shared(matrix, 0, "descriptor") + simt::kWindow;
  return place >> 4 | uint64_t(next_inputs >> 4) << 16 | uint64_t(next_outputs >> 4) << 32;
}
inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

template <class T, int kTiles>
void multiply_group(float (&c)[kTiles][4], const uint32_t (&a)[4], uint64_t b, SIMT_LINE) {
  static_assert(kTiles >= 1 && kTiles <= 32, "8 to 256 columns");
  simt::HopperThread &thread = simt::hopper_thread();
  if (b & ~(0x3fffull | 0x3fffull << 16 | 0x3fffull << 32))
    simt::fail("multiply_group in line %d with a descriptor that is not emulated: %llx", line, (unsigned long long)b);
  if (!thread.fenced)
    simt::fail("multiply_group in line %d without fence_products", line);
  simt::meet_group(b, line);
  float *sums = &c[0][0];
  if (!thread.sums.count(sums)) {
    thread.sums[sums].assign(sums, sums + 4 * kTiles);
    std::fill(sums, sums + 4 * kTiles, NAN);
  }
  thread.open.push_back({sums, a, b, kTiles, [](uint16_t bits) { return widen(T{bits}); }});
  simt::check_arrivals(thread.open.back());
}

template <int kTiles> void hold(float (&)[kTiles][4]) {}
inline void hold(uint32_t (&)[4]) {}

inline void fence_products(SIMT_LINE) {
  simt::meet(simt::kAllLanes, 0, "fence_products", line);
  simt::hopper_thread().fenced = true;
}
inline void commit_products(SIMT_LINE) {
  simt::meet(simt::kAllLanes, 0, "commit_products", line);
  simt::HopperThread &thread = simt::hopper_thread();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int n> void wait_products(SIMT_LINE) {
  simt::HopperThread &thread = simt::hopper_thread();
  for (; thread.groups.size() > size_t(n); thread.groups.erase(thread.groups.begin()))
    simt::happen(thread.groups.front(), line);
  std::set<float *> busy;
  for (const auto &group : thread.groups)
    for (const simt::Product &product : group)
      busy.insert(product.sums);
  for (const simt::Product &product : thread.open)
    busy.insert(product.sums);
  for (auto one = thread.sums.begin(); one != thread.sums.end();)
    if (busy.count(one->first)) {
      ++one;
    } else {
      std::copy(one->second.begin(), one->second.end(), one->first);
      one = thread.sums.erase(one);
    }
  thread.fenced = false;
}

} // namespace hrpose::cuda
