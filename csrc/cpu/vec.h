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
#elif defined(__AVX2__)
using Vec = __m256;
constexpr int kLanes = 8, kRows = 6, kVecs = 2;
inline Vec load(const float *p) { return _mm256_loadu_ps(p); }
inline void store(float *p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec broadcast(float f) { return _mm256_set1_ps(f); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
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
#endif

inline Vec relu(Vec v) { return Vec{} > v ? Vec{} : v; } // NaN stays NaN
