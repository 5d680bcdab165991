// What bench/native.py measures against, and its stop-watch: loops that Python
// could not time without adding to them.
#include "../native/trilobit.h"

#include <chrono>
#include <immintrin.h>

namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

} // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Seconds of one pass of 64-byte loads over `bytes` of memory, the best of
// `repeats`.
EXPORT __attribute__((target("avx512f"))) double
read_seconds(const uint8_t *memory, int64_t bytes, int repeats) {
  double best = 1e9;
  for (int r = 0; r < repeats; ++r) {
    const auto start = Clock::now();
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (const uint8_t *p = memory, *end = memory + bytes; p < end; p += 256) {
      _mm_prefetch(reinterpret_cast<const char *>(p) + 8192, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char *>(p) + 8256, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char *>(p) + 8320, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char *>(p) + 8384, _MM_HINT_T0);
      a = _mm512_or_si512(a, _mm512_loadu_si512(p));
      b = _mm512_or_si512(b, _mm512_loadu_si512(p + 64));
      c = _mm512_or_si512(c, _mm512_loadu_si512(p + 128));
      d = _mm512_or_si512(d, _mm512_loadu_si512(p + 192));
    }
    a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
    asm volatile("" ::"v"(a));
    const double seconds = since(start);
    best = seconds < best ? seconds : best;
  }
  return best;
}

// int8 operations (a multiply and an add are two) a second of vpdpbusd on
// registers alone, the best of `repeats`.
EXPORT __attribute__((target("avx512f,avx512vnni"))) double
peak_operations(int repeats) {
  constexpr int LOOPS = 20000, CHAINS = 16;
  double best = 1e9;
  for (int r = 0; r < repeats; ++r) {
    __m512i sum[CHAINS], w = _mm512_set1_epi8(1), x = _mm512_set1_epi8(2);
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; ++i)
      sum[i] = _mm512_setzero_si512();
    const auto start = Clock::now();
    for (int loop = 0; loop < LOOPS; ++loop)
#pragma GCC unroll 16
      for (int i = 0; i < CHAINS; ++i)
        asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum[i]) : "v"(w), "v"(x));
    const double seconds = since(start);
    best = seconds < best ? seconds : best;
  }
  return 2.0 * 64 * LOOPS * CHAINS / best;
}

using Product = int32_t (*)(const trilobit_matrix *, const int8_t *, int64_t,
                            int32_t *, int32_t, int32_t);

// Seconds of one product, the best of `repeats`.
EXPORT double product_seconds(Product product, const trilobit_matrix *matrix,
                              const int8_t *x, int64_t tokens, int32_t *y,
                              int32_t set, int32_t threads, int repeats) {
  double best = 1e9;
  for (int r = 0; r < repeats; ++r) {
    const auto start = Clock::now();
    product(matrix, x, tokens, y, set, threads);
    const double seconds = since(start);
    best = seconds < best ? seconds : best;
  }
  return best;
}
