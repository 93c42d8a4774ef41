// A vector of floats as wide as this unit's registers, and the register tile of its matrix products. +, - and * are the
// compiler's own; fma is an intrinsic, because -ffp-contract=off forbids the compiler to form one.
//
// A tile is kRows rows times kVecs vectors of sums that stay in registers: 24 of AVX-512's 32, 12 of AVX2's 16, 8 of
// SSE2's 16 (which also needs room for products). A row costs one broadcast and kVecs multiplications per step of k.
#pragma once
#if defined(__AVX512F__)
using Vec = __m512;
constexpr int kLanes = 16, kRows = 12, kVecs = 2;
inline Vec load(const float *p) { return _mm512_loadu_ps(p); }
inline void store(float *p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec broadcast(float f) { return _mm512_set1_ps(f); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); } // a b + c
inline Vec relu(Vec v) { return _mm512_maskz_max_ps(0xffff, Vec{}, v); } // NaN, the second operand, stays NaN
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int kLanes = 8, kRows = 6, kVecs = 2;
inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec broadcast(float f) { return _mm256_set1_ps(f); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec relu(Vec v) { return _mm256_max_ps(Vec{}, v); }
#else
typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4, kRows = 4, kVecs = 2;
inline Vec load(const float *p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float *p, Vec v) { std::memcpy(p, &v, sizeof v); }
inline Vec broadcast(float f) { return Vec{f, f, f, f}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec relu(Vec v) { return Vec{} > v ? Vec{} : v; }
#endif

// Element type of a product: its values per multiplication in one lane, and how they meet.
template <class T> constexpr int kDepth = 1;
inline Vec load_weights(const float *p) { return load(p); }
inline Vec broadcast_inputs(const float *p) { return broadcast(*p); }
inline Vec multiply_add(Vec a, Vec b, Vec c) { return fma(a, b, c); }

#ifdef __AVX512BF16__
struct Bf16 {
  uint16_t bits;
};
struct Pairs { // two bf16 per lane
  __m512i bits;
};
template <> constexpr int kDepth<Bf16> = 2;
inline Vec load(const Bf16 *p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  // The unmasked forms make GCC 12 warn of uninitialised values within its own headers.
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, _mm512_maskz_cvtepu16_epi32(0xffff, bits), 16));
}
inline void store(Bf16 *p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), (__m256i)_mm512_cvtneps_pbh(v));
}
inline void store(Bf16 *p, Vec first, Vec second) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}
inline Pairs load_weights(const Bf16 *p) { return {_mm512_loadu_si512(p)}; }
inline Pairs broadcast_inputs(const Bf16 *p) {
  int pair;
  std::memcpy(&pair, p, sizeof pair);
  return {_mm512_set1_epi32(pair)};
}
inline Vec multiply_add(Pairs a, Pairs b, Vec c) { return _mm512_dpbf16_ps(c, (__m512bh)a.bits, (__m512bh)b.bits); }
#endif
