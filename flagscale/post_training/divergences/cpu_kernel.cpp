// The pass over rows of logits for a CPU, a row at a time: it stays in the core's cache, and what is
// read again does not come from memory. Each formula stands here once more, per column, as in
// triton_kernel.py. Loops are plain, and the compiler makes vectors of them; no product is contracted
// with a sum unless written so, or models with equal logits would differ by a rounding.

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
constexpr float NEAR = 0.1f;      // log ratios up to which a series is exact in float32
constexpr int64_t BLOCK = 1024;   // columns that are added up in float32, then on in float64
constexpr int64_t FEW = 64;       // columns of which the largest logit is looked at first

enum Kind { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_KL, TOTAL_VARIATION };

INLINE float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE float of_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

INLINE int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) to a unit in the last place; 0 where it would be subnormal, NaN for NaN. Cephes' expf.
INLINE float exponential(float x) {
  float z = x < -87.0f ? -87.0f : x;
  z = z > 88.0f ? 88.0f : z;
  const float n = std::nearbyint(z * 1.44269504088896341f);
  float r = fused(n, -0.693359375f, z);
  r = fused(n, 2.12194440e-4f, r);
  float series = 1.9875691500e-4f;
  series = fused(series, r, 1.3981999507e-3f);
  series = fused(series, r, 8.3334519073e-3f);
  series = fused(series, r, 4.1665795894e-2f);
  series = fused(series, r, 1.6666665459e-1f);
  series = fused(series, r, 5.0000001201e-1f);
  series = fused(series, r * r, r) + 1.0f;
  const float result = series * of_bits((static_cast<int32_t>(n) + 127) * (1 << 23));
  return x < -87.0f ? 0.0f : result;
}

// log(z) of a positive z = 1 + y, exact also where z is near 1 and y says by how much it is not.
INLINE float logarithm(float z, float y) {
  const bool near = y > -0.29f;
  const int32_t exponent = near ? 0 : (bits_of(z) - 0x3f3504f3) >> 23;
  const float above_1 = near ? y : of_bits(bits_of(z) - exponent * (1 << 23)) - 1;
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

Normaliser given(float m, float log_z) {
  Normaliser result{m, log_z, 0, 0};
  result.weigh(std::exp(-static_cast<double>(log_z)));
  return result;
}

struct Mixture {
  float to_p, to_q;  // log(p / m) and log(q / m)
  float q_share;     // q / m
};

// m = weight p + (1 - weight) q; x = log(p / q). See mixtures.py.
INLINE Mixture mixture(float x, float weight) {
  x = std::min(std::max(x, -FLT_MAX), FLT_MAX);
  const float d = -std::fabs(x);
  const float less = exponential(d);  // the smaller of p and q over the larger
  float series = fused(d, 1.0f / 720, 1.0f / 120);
  series = fused(series, d, 1.0f / 24);
  series = fused(series, d, 1.0f / 6);
  series = fused(series, d, 0.5f);
  series = d * fused(series, d, 1.0f);
  const float share = x > 0 ? 1 - weight : weight, other = x > 0 ? weight : 1 - weight;
  const float y = share * (d > -0.25f ? series : less - 1);
  const float over_larger = fused(share, less, other);  // m over the larger: 1 + y
  const float log_m = logarithm(over_larger, y);
  const float q_share = (x > 0 ? less : 1.0f) / over_larger;
  return weight == 0 ? Mixture{x, 0, 1}
                     : Mixture{std::min(x, 0.0f) - log_m, -log_m - std::max(x, 0.0f), q_share};
}

// p x + (q - p), x = log(p / q): a series where both are close.
INLINE float kl(float p, float x, float difference) {
  x = std::max(x, -FLT_MAX);
  float series = fused(x, 1.0f / 120, -1.0f / 24);
  series = fused(series, x, 1.0f / 6);
  series = p * x * x * (0.5f - x * series);
  return std::fabs(x) < NEAR ? series : p * x + difference;
}

INLINE float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }

struct Column {
  float p, q, x;
};

// Both rows as probabilities, and the log of their ratio, 0 where neither has any.
struct Row {
  float* student;
  const float* teacher;
  Normaliser of_student, of_teacher;
  float scale, shift;

  Row(float* student, const float* teacher, Normaliser s, Normaliser t, float scale)
      : student(student), teacher(teacher), of_student(s), of_teacher(t), scale(scale),
        shift(static_cast<float>((static_cast<double>(s.m) - t.m) * scale + t.log_weight -
                                 s.log_weight)) {}

  INLINE Column column(int64_t j) const {
    const float s = student[j], t = teacher[j];
    const float p = exponential((t - of_teacher.m) * scale) * of_teacher.weight;
    const float q = exponential((s - of_student.m) * scale) * of_student.weight;
    const float x = (t - s) * scale + shift;
    return {p, q, (p == 0) & (q == 0) ? 0 : x};
  }
};

struct Sums {
  double first, second;
};

// What a column adds to the two sums, and what its gradient wants beside q.
struct Summands {
  float one, two, kept;
};

template <Kind KIND>
INLINE Summands summands(const Column c, float weight) {
  const float difference = c.q - c.p;
  if (KIND == FORWARD_KL) return {kl(c.p, c.x, difference), 0, difference};
  if (KIND == REVERSE_KL) return {kl(c.q, -c.x, -difference), 0, std::max(-c.x, -FLT_MAX)};
  if (KIND == TOTAL_VARIATION) {
    const float half = sign(-c.x) / 2;
    return {difference * half, c.q * half, half};
  }
  const Mixture m = mixture(c.x, weight);
  if (KIND == JENSEN_SHANNON) {
    const float student = c.q * m.to_q;
    return {weight * (c.p * m.to_p) + (1 - weight) * student, student, m.to_q};
  }
  const float tilted = -difference * (1 - weight) * m.q_share;
  return {kl(c.p, m.to_p, (1 - weight) * difference), tilted, tilted};
}

// By the student's scaled logit, given both sums of whole rows.
template <Kind KIND>
INLINE float gradient(float q, float kept, float weight, float first, float second) {
  if (KIND == FORWARD_KL) return kept;
  if (KIND == REVERSE_KL) return q * (kept - first);
  if (KIND == TOTAL_VARIATION) return q * (kept - second);
  if (KIND == JENSEN_SHANNON) return (1 - weight) * q * (kept - second);
  return (1 - weight) * (q * second - kept);
}

// Sums of a row; with KEEP, also q and what is kept of each column, for `write_kept`.
template <Kind KIND, bool KEEP>
Sums add_up(const Row row, int64_t width, float weight, float* q, float* kept) {
  Sums sums{0, 0};
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, width);
    float one = 0, two = 0;
#pragma omp simd reduction(+ : one, two)
    for (int64_t j = start; j < stop; ++j) {
      const Column column = row.column(j);
      const Summands both = summands<KIND>(column, weight);
      one += both.one;
      two += both.two;
      if (KEEP) {
        q[j] = column.q;
        kept[j] = both.kept;
      }
    }
    sums.first += one;
    sums.second += two;
  }
  return sums;
}

template <Kind KIND>
void write_kept(float* out, const float* q, const float* kept, int64_t width, float weight,
                float first, float second, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    out[j] = gradient<KIND>(q[j], kept[j], weight, first, second) * factor;
}

template <Kind KIND>
void write(const Row row, int64_t width, float weight, float first, float second, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const Column column = row.column(j);
    const float kept = summands<KIND>(column, weight).kept;
    row.student[j] = gradient<KIND>(column.q, kept, weight, first, second) * factor;
  }
}

// The one gradient that needs no sum is written along.
Sums add_up_and_write_forward_kl(const Row row, int64_t width, float factor) {
  Sums sums{0, 0};
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, width);
    float one = 0;
#pragma omp simd reduction(+ : one)
    for (int64_t j = start; j < stop; ++j) {
      const Summands both = summands<FORWARD_KL>(row.column(j), 0);
      one += both.one;
      row.student[j] = both.kept * factor;
    }
    sums.first += one;
  }
  return sums;
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
      row[j] = of_bits(static_cast<int32_t>(static_cast<uint32_t>(narrow[j]) << 16));
  }

  void write_back(int64_t width) const {
    if (narrow == nullptr) return;
#pragma omp simd
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t bits = static_cast<uint32_t>(bits_of(row[j]));
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest even
      narrow[j] = static_cast<uint16_t>(row[j] != row[j] ? 0x7fc0 : rounded);
    }
  }
};

// The tokens of the k largest logits, in order; among equal logits the first ones.
struct Likeliest {
  std::vector<float> largest, order;
  std::vector<int64_t> candidates;

  static float key(float logit) { return logit != logit ? INFINITE : logit; }

  void find(const float* logits, int64_t width, int64_t k, int64_t* tokens) {
    // The k-th largest of the largest logits of blocks is a bound from below: few are above it.
    const int64_t size = std::max<int64_t>(1, std::min(FEW, width / k));
    largest.clear();
    for (int64_t start = 0; start < width; start += size) {
      float top = -INFINITE;
      const int64_t stop = std::min(start + size, width);
#pragma omp simd reduction(max : top)
      for (int64_t j = start; j < stop; ++j) top = key(logits[j]) > top ? key(logits[j]) : top;
      largest.push_back(top);
    }
    const float bound = kth(largest, k);
    candidates.clear();
    for (size_t block = 0; block < largest.size(); ++block) {
      if (largest[block] < bound) continue;
      const int64_t start = static_cast<int64_t>(block) * size;
      for (int64_t j = start; j < std::min(start + size, width); ++j)
        if (key(logits[j]) >= bound) candidates.push_back(j);
    }
    std::vector<float>& keys = order;
    keys.clear();
    for (const int64_t token : candidates) keys.push_back(key(logits[token]));
    std::vector<float> values = keys;
    std::nth_element(values.begin(), values.begin() + (k - 1), values.end(), std::greater<float>());
    const float least = values[k - 1];
    int64_t room = k - std::count_if(keys.begin(), keys.end(), [=](float x) { return x > least; });
    for (size_t i = 0; i < keys.size(); ++i)
      if (keys[i] > least || (keys[i] == least && room-- > 0)) *tokens++ = candidates[i];
  }

  float kth(const std::vector<float>& values, int64_t k) {
    order = values;
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    return order[k - 1];
  }
};

// A row without some of its tokens.
const float* tail(const float* row, int64_t width, const int64_t* tokens, int64_t k,
                  std::vector<float>& space) {
  space.assign(row, row + width);
  for (int64_t i = 0; i < k; ++i) space[tokens[i]] = -INFINITE;
  return space.data();
}

}  // namespace

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

template <Kind KIND>
void pass(const Logits& logits, int64_t begin, int64_t end, float weight, float* norms,
          int64_t norms_stride, float* sums, int64_t sums_stride, bool normalise, bool sum,
          bool with_gradient) {
  std::vector<float> student_space, teacher_space, q(logits.width), kept(logits.width);
  const float scale = 1 / logits.temperature, factor = logits.temperature;
  for (int64_t i = begin; i < end; ++i) {
    const Widened s = logits.student_row(i, student_space);
    const Widened t = logits.teacher_row(i, teacher_space);
    float* n = norms + i;
    const Normaliser of_teacher =
        normalise ? normaliser(t.row, logits.width, scale) : given(n[0], n[norms_stride]);
    const Normaliser of_student = normalise ? normaliser(s.row, logits.width, scale)
                                            : given(n[2 * norms_stride], n[3 * norms_stride]);
    if (normalise) {
      n[0] = of_teacher.m;
      n[norms_stride] = static_cast<float>(of_teacher.log_z);
      n[2 * norms_stride] = of_student.m;
      n[3 * norms_stride] = static_cast<float>(of_student.log_z);
    }
    const Row row(s.row, t.row, of_student, of_teacher, scale);
    const bool both = sum && with_gradient, along = both && KIND == FORWARD_KL;
    if (sum) {
      const Sums made =
          along  ? add_up_and_write_forward_kl(row, logits.width, factor)
          : both ? add_up<KIND, true>(row, logits.width, weight, q.data(), kept.data())
                 : add_up<KIND, false>(row, logits.width, weight, nullptr, nullptr);
      sums[i] = static_cast<float>(made.first);
      if (sums_stride) sums[i + sums_stride] = static_cast<float>(made.second);
    }
    const float second = sums_stride ? sums[i + sums_stride] : 0;
    if (both && !along)
      write_kept<KIND>(s.row, q.data(), kept.data(), logits.width, weight, sums[i], second, factor);
    else if (with_gradient && !along)
      write<KIND>(row, logits.width, weight, sums[i], second, factor);
    if (with_gradient) s.write_back(logits.width);
  }
}

extern "C" {

// As `passing.one_pass`, over rows `begin` to `end`; a `sums_stride` of 0: there is but one sum.
void one_pass(const Logits* logits, int64_t begin, int64_t end, int32_t kind, float weight,
              float* norms, int64_t norms_stride, float* sums, int64_t sums_stride,
              int32_t normalise, int32_t sum, int32_t with_gradient) {
  auto* run = kind == FORWARD_KL       ? pass<FORWARD_KL>
              : kind == REVERSE_KL     ? pass<REVERSE_KL>
              : kind == JENSEN_SHANNON ? pass<JENSEN_SHANNON>
              : kind == SKEW_KL        ? pass<SKEW_KL>
                                       : pass<TOTAL_VARIATION>;
  run(*logits, begin, end, weight, norms, norms_stride, sums, sums_stride, normalise != 0, sum != 0,
      with_gradient != 0);
}

// As `TopKKL._part`: tokens [rows, k], parts [rows, 4 + 2 k].
void top_k_parts(const Logits* logits, int64_t begin, int64_t end, int64_t k, int64_t* tokens,
                 float* parts) {
  std::vector<float> student_space, teacher_space, space;
  Likeliest likeliest;
  const float scale = 1 / logits->temperature;
  for (int64_t i = begin; i < end; ++i) {
    const Widened s = logits->student_row(i, student_space);
    const Widened t = logits->teacher_row(i, teacher_space);
    int64_t* own = tokens + i * k;
    float* part = parts + i * (4 + 2 * k);
    likeliest.find(t.row, logits->width, k, own);
    for (const float* row : {static_cast<const float*>(t.row), static_cast<const float*>(s.row)}) {
      const Normaliser of_tail =
          normaliser(tail(row, logits->width, own, k, space), logits->width, scale);
      *part++ = of_tail.m;
      *part++ = static_cast<float>(of_tail.log_z);
    }
    for (int64_t j = 0; j < k; ++j) *part++ = t.row[own[j]];
    for (int64_t j = 0; j < k; ++j) *part++ = s.row[own[j]];
  }
}

// As `TopKKL._write`.
void top_k_write(const Logits* logits, int64_t begin, int64_t end, int64_t k, const int64_t* tokens,
                 const float* factors, const float* at_tokens, const double* log_z) {
  std::vector<float> student_space;
  const float scale = 1 / logits->temperature;
  for (int64_t i = begin; i < end; ++i) {
    const Widened s = logits->student_row(i, student_space);
    const int64_t* own = tokens + i * k;
    for (int64_t j = 0; j < k; ++j) s.row[own[j]] = -INFINITE;
    float m = -FLT_MAX;
#pragma omp simd reduction(max : m)
    for (int64_t j = 0; j < logits->width; ++j) m = s.row[j] > m ? s.row[j] : m;
    const float shift = static_cast<float>(static_cast<double>(m) * scale - log_z[i]);
    const float factor = factors[i] * logits->temperature;
#pragma omp simd
    for (int64_t j = 0; j < logits->width; ++j)
      s.row[j] = exponential((s.row[j] - m) * scale + shift) * factor;
    for (int64_t j = 0; j < k; ++j) s.row[own[j]] = at_tokens[i * k + j] * logits->temperature;
    s.write_back(logits->width);
  }
}

}  // extern "C"
