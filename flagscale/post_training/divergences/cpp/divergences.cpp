// The pass over rows of logits for a CPU, a row at a time: it stays in the core's cache, and what is
// read again does not come from memory. Each formula stands here once more, per column, as in
// triton_kernel.py.
#include "rows.h"

namespace {

constexpr float NEAR = 0.1f;      // log ratios up to which a series is exact in float32

enum Kind { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_KL, TOTAL_VARIATION };

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

}  // namespace

// As `passing.one_pass`, over rows `begin` to `end`; a `sums_stride` of 0: there is but one sum.
extern "C" void one_pass(const Logits* logits, int64_t begin, int64_t end, int32_t kind, float weight,
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
