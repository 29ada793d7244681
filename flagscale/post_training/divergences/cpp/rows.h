// Rows of logits of both models, and what makes probabilities of them. Loops are plain, and the
// compiler makes vectors of them; no product is contracted with a sum unless written so, or models
// with equal logits would differ by a rounding.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

// A call inside a loop would keep the compiler from making vectors of it.
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t BLOCK = 1024;   // columns that are added up in float32, then on in float64

INLINE float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE float of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) of x up to 88, to a unit in the last place; 0 where it would be subnormal, NaN for NaN.
// Cephes' expf. Above 2^23 a float32 is a whole number, which its last bits are.
INLINE float exponential(float x) {
  constexpr float WHOLE = 1.5f * (1 << 23) + 127;  // 127: the exponent's bits of 2^0
  const float whole = fused(x, 1.44269504088896341f, WHOLE), n = whole - WHOLE;
  float r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  float series = 1.9875691500e-4f;
  series = fused(series, r, 1.3981999507e-3f);
  series = fused(series, r, 8.3334519073e-3f);
  series = fused(series, r, 4.1665795894e-2f);
  series = fused(series, r, 1.6666665459e-1f);
  series = fused(series, r, 5.0000001201e-1f);
  series = fused(series, r * r, r) + 1.0f;
  const float result = series * of_bits(bits_of(whole) << 23);
  return x < -87.0f ? 0.0f : result;
}

// log(z) of a positive z = 1 + y, exact also where z is near 1 and y says by how much it is not.
INLINE float logarithm(float z, float y) {
  const bool far = y <= -0.29f;  // NaN is not, and stays
  const int32_t exponent = far ? static_cast<int32_t>(bits_of(z) - 0x3f3504f3) >> 23 : 0;
  const uint32_t bits = static_cast<uint32_t>(exponent) << 23;
  const float above_1 = far ? of_bits(bits_of(z) - bits) - 1 : y;
  const float r = above_1 / (2 + above_1), square = r * r;
  float series = fused(square, 1.0f / 9, 1.0f / 7);
  series = fused(series, square, 0.2f);
  series = fused(series, square, 1.0f / 3);
  series = fused(series, square, 1.0f);
  return fused(static_cast<float>(exponent), 0.693147181f, 2 * r * series);
}

// What makes probabilities of a row's logits: exp((logit - m) / T) * weight.
struct Normaliser {
  float m;        // the largest logit
  double log_z;   // the log of the sum of the exponentials
  float weight;   // its reciprocal, and the log of that to the last digit of what it was rounded to
  double log_weight;

  void weigh(double reciprocal) {
    weight = static_cast<float>(std::min(reciprocal, 1.0));  // infinite where all is -inf
    log_weight = std::log(static_cast<double>(weight));
  }
};

Normaliser normaliser(const float* logits, int64_t width, float scale) {
  float m = -FLT_MAX;  // a slice may hold nothing but -inf
#pragma omp simd reduction(max : m)
  for (int64_t j = 0; j < width; ++j) m = logits[j] > m ? logits[j] : m;
  double total = 0;
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, width);
    float part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t j = start; j < stop; ++j) part += exponential((logits[j] - m) * scale);
    total += part;
  }
  Normaliser result{m, std::log(total), 0, 0};
  result.weigh(1 / total);
  return result;
}

inline Normaliser given(float m, float log_z) {
  Normaliser result{m, log_z, 0, 0};
  result.weigh(std::exp(-static_cast<double>(log_z)));
  return result;
}

// A row in float32: itself, or a copy that is written back.
struct Widened {
  uint16_t* narrow = nullptr;
  float* row;

  Widened(void* logits, bool bfloat16, std::vector<float>& space, int64_t width) {
    row = static_cast<float*>(logits);
    if (!bfloat16) return;
    narrow = static_cast<uint16_t*>(logits);
    space.resize(width);
    row = space.data();
#pragma omp simd
    for (int64_t j = 0; j < width; ++j)
      row[j] = of_bits(static_cast<uint32_t>(narrow[j]) << 16);
  }

  void write_back(int64_t width) const {
    if (narrow == nullptr) return;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t bits = bits_of(row[j]);
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest even
      narrow[j] = static_cast<uint16_t>(row[j] != row[j] ? 0x7fc0 : rounded);
    }
  }
};

// Logits of both models, [rows, width], rows lying `stride` elements apart.
struct Logits {
  char* student;
  char* teacher;
  int64_t student_stride, teacher_stride, width;
  int32_t student_bfloat16, teacher_bfloat16;
  float temperature;

  Widened student_row(int64_t row, std::vector<float>& space) const {
    return {student + row * student_stride * (student_bfloat16 ? 2 : 4), student_bfloat16 != 0,
            space, width};
  }
  Widened teacher_row(int64_t row, std::vector<float>& space) const {
    return {teacher + row * teacher_stride * (teacher_bfloat16 ? 2 : 4), teacher_bfloat16 != 0,
            space, width};
  }
};

}  // namespace
