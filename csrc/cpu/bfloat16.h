// Single values as kernels that also take bfloat16 read and write them, on every instruction set.
#pragma once

namespace scalar {

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float *from) { return *from; }
inline float load(const BFloat16 *from) {
  const uint32_t bits = uint32_t(from->bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void store(float *to, float value) { *to = value; }
inline void store(BFloat16 *to, float value) { // to nearest, half to even; NaN as PyTorch writes it
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to->bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

} // namespace scalar
