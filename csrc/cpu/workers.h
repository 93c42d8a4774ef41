// How kernels share work between threads.
#pragma once

constexpr int kSpins = 2000;  // about 50 us: longer than strips take, shorter than a slice of the scheduler
constexpr int64_t kLine = 64; // bytes: a cache line

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Part `index` of `parts` equal parts of 0..total begins here.
inline int64_t part_begin(int64_t total, int64_t parts, int64_t index) { return total * index / parts; }
// Bytes of `count` elements in whole cache lines.
template <class Element> int64_t lines(int64_t count) {
  return ceil_div(count * int64_t(sizeof(Element)), kLine) * kLine;
}

// Calls body(begin, end) on `workers` equal parts of 0..total. One worker runs in the calling thread without entering
// OpenMP, so that a process forked after its parent used OpenMP (a data loader's worker) cannot hang.
template <class Body> void split(int64_t total, int workers, Body body) {
  if (workers <= 1 || total <= 1) {
    body(int64_t(0), total);
    return;
  }
#pragma omp parallel for num_threads(workers) schedule(static, 1)
  for (int part = 0; part < workers; ++part)
    body(part_begin(total, workers, part), part_begin(total, workers, part + 1));
}

// Calls body(rank, size) once in each of at most `workers` workers: OpenMP may grant fewer.
template <class Body> void team(int workers, Body body) {
#ifdef _OPENMP
  if (workers > 1) {
#pragma omp parallel num_threads(workers)
    body(omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  body(0, 1);
}

// The next number of a counter that the team shares.
inline int64_t take(int64_t *ticket) { return __atomic_fetch_add(ticket, 1, __ATOMIC_RELAXED); }

// Waits until `target` arrivals. Spins for as long as the others usually need, then lets them have the core.
inline void meet(int *arrived, int target) {
  __atomic_fetch_add(arrived, 1, __ATOMIC_ACQ_REL);
  for (int spins = 0; __atomic_load_n(arrived, __ATOMIC_ACQUIRE) < target; ++spins)
    if (spins > kSpins)
      sched_yield();
#ifdef HRPOSE_X86
    else
      __builtin_ia32_pause();
#endif
}
