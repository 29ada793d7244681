// The pass over rows of logits for a CPU, a row at a time: it stays in the core's cache, and what is
// read again does not come from memory. Each formula stands here once more, per column, as in
// triton_kernel.py.
#include "rows.h"

namespace {

constexpr float NEAR = 0.1f;      // log ratios up to which a series is exact in float32

enum Kind { FORWARD_KL, REVERSE_KL, JENSEN_SHANNON, SKEW_KL, TOTAL_VARIATION };

// Of a mixture m = p's weight p + q's weight q.
struct Weights {
  float p, q, odds;
  float limit;  // of log(q / m), where p is 0
  float apart;  // log(p / q) below which the distance from that limit is what is small

  explicit Weights(float weight)
      : p(weight), q(1 - weight), odds(p / q), limit(-std::log1p(-weight)),
        apart(std::log(std::min(0.5f, 0.4f / odds))) {}
};

struct Mixture {
  float to_p, to_q;  // log(p / m) and log(q / m)
  float room;        // from log(q / m) to its limit
  float q_share;     // q / m
};

// x = log(p / q). See mixtures.py. With ROOM that is made too, and the logarithms from it where
// it is what is small. Where there is no p or no q, they may be infinite or NaN.
template <bool ROOM>
INLINE Mixture mixture(float p, float q, float x, const Weights& weights) {
  const float d = -std::fabs(x);
  float series = fused(d, 1.0f / 720, 1.0f / 120);
  series = fused(series, d, 1.0f / 24);
  series = fused(series, d, 1.0f / 6);
  series = fused(series, d, 0.5f);
  series = d * fused(series, d, 1.0f);
  // The smaller of p and q over the larger. A quotient has fewer digits, which `room` would show.
  const float less = ROOM ? exponential(d) : (p < q ? p : q) / (p < q ? q : p);
  const bool up = x > 0;
  const float above = up ? x : 0, below = up ? 0 : x;
  const float share = up ? weights.q : weights.p, other = up ? weights.p : weights.q;
  const float over_larger = fused(share, less, other);  // m over the larger
  // m = (1 + y) times the larger, or where p is next to nothing, times the limit's weight q.
  const bool apart = ROOM && x < weights.apart;
  const float near_1 = share * (d > -0.25f ? series : less - 1);
  const float log_1_y = logarithm(over_larger, apart ? weights.odds * less : near_1);
  const float to_limit = apart ? weights.limit : 0;  // what log(1 + y) is short of log(m)
  const float short_of = log_1_y + above;
  return {(below - log_1_y) + to_limit, to_limit - short_of,
          short_of + (apart ? 0 : weights.limit), (up ? less : 1) / over_larger};
}

// A probability times what may be infinite or NaN where there is none.
INLINE float times(float probability, float x) { return probability == 0 ? 0.0f : probability * x; }

// p x + (q - p), x = log(p / q): a series where both are close.
INLINE float kl(float p, float x, float difference) {
  float series = fused(x, 1.0f / 120, -1.0f / 24);
  series = fused(series, x, 1.0f / 6);
  series = p * x * x * (0.5f - x * series);
  return std::fabs(x) < NEAR ? series : times(p, x) + difference;
}

// Both as probabilities, and x = log(p / q): infinite where one is 0, NaN where both are.
struct Column {
  float p, q, x;
};

// Both models' logits of a token, of which columns are made.
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
    return {p, q, (t - s) * scale + shift};
  }
};

// What a column adds to the sums, and the latter two are what its gradient wants of it: see
// bounded.py. Of the KLs they are what their own gradients want, and nobody their sums.
struct Summands {
  float value, excess, room;
};

template <Kind KIND>
constexpr bool BOUNDED = KIND != FORWARD_KL && KIND != REVERSE_KL;

template <Kind KIND>
INLINE Summands summands(const Column c, const Weights& weights) {
  const float difference = c.q - c.p;
  if (KIND == FORWARD_KL) return {kl(c.p, c.x, difference), difference, 0};
  if (KIND == REVERSE_KL)
    return {kl(c.q, -c.x, -difference), c.q == 0 ? 0.0f : -c.x, c.q};
  if (KIND == TOTAL_VARIATION) {
    const float excess = c.x > 0 ? 0.0f : c.x < 0 ? c.q : (c.q + difference) / 2;  // p may be NaN
    return {(c.x > 0 ? -difference : difference) / 2, excess, c.q - excess};
  }
  const Mixture m = mixture<KIND == JENSEN_SHANNON>(c.p, c.q, c.x, weights);
  if (KIND == JENSEN_SHANNON) {
    const float excess = times(c.q, m.to_q);
    return {weights.p * times(c.p, m.to_p) + weights.q * excess, excess,
            times(c.q, m.room) * (weights.q / weights.limit)};
  }
  const bool neither = (c.p == 0) & (c.q == 0);
  const float to_p = weights.p == 0 ? c.x : m.to_p, q_share = weights.p == 0 ? 1 : m.q_share;
  const float share = neither ? 0 : weights.q * q_share;
  return {kl(c.p, to_p, weights.q * difference), difference * share, c.p * share};
}

// By the student's scaled logit, given the sums of whole rows.
template <Kind KIND>
INLINE float gradient(float excess, float room, const Summands& sums) {
  if (KIND == FORWARD_KL) return excess;
  if (KIND == REVERSE_KL) return room * (excess - sums.value);
  return excess * sums.room - room * sums.excess;
}

// Sums of a row; with KEEP, what its gradient wants of each column is kept for `write_kept`: excess
// in the place of the student's logits, so that fewer numbers have to stay in the cache.
template <Kind KIND, bool KEEP>
Summands add_up(const Row row, int64_t width, const Weights weights, float* room) {
  double value = 0, excesses = 0, rooms = 0;
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, width);
    float one = 0, two = 0, three = 0;
#pragma omp simd reduction(+ : one, two, three)
    for (int64_t j = start; j < stop; ++j) {
      const Summands column = summands<KIND>(row.column(j), weights);
      one += column.value;
      if (BOUNDED<KIND>) {
        two += column.excess;
        three += column.room;
      }
      if (KEEP) {
        row.student[j] = column.excess;
        room[j] = column.room;
      }
    }
    value += one;
    excesses += two;
    rooms += three;
  }
  return {static_cast<float>(value), static_cast<float>(excesses), static_cast<float>(rooms)};
}

template <Kind KIND>
void write_kept(float* out, const float* room, int64_t width, const Summands sums, float factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j)
    out[j] = gradient<KIND>(out[j], room[j], sums) * factor;
}

template <Kind KIND>
void write(const Row row, int64_t width, const Weights weights, const Summands sums,
           float factor) {
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const Summands column = summands<KIND>(row.column(j), weights);
    row.student[j] = gradient<KIND>(column.excess, column.room, sums) * factor;
  }
}

// The one gradient that needs no sum is written along.
Summands add_up_and_write_forward_kl(const Row row, int64_t width, const Weights weights,
                                     float factor) {
  double value = 0;
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t stop = std::min(start + BLOCK, width);
    float one = 0;
#pragma omp simd reduction(+ : one)
    for (int64_t j = start; j < stop; ++j) {
      const Summands column = summands<FORWARD_KL>(row.column(j), weights);
      one += column.value;
      row.student[j] = column.excess * factor;
    }
    value += one;
  }
  return {static_cast<float>(value), 0, 0};
}

template <Kind KIND>
void pass(const Logits& logits, int64_t begin, int64_t end, float weight, float* norms,
          int64_t norms_stride, float* sums, int64_t sums_stride, bool normalise, bool sum,
          bool with_gradient) {
  std::vector<float> student_space, teacher_space, room(logits.width);
  const float scale = 1 / logits.temperature, factor = logits.temperature;
  const Weights weights(weight);
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
    Summands whole{0, 0, 0};
    if (sum) {
      whole = along  ? add_up_and_write_forward_kl(row, logits.width, weights, factor)
              : both ? add_up<KIND, true>(row, logits.width, weights, room.data())
                     : add_up<KIND, false>(row, logits.width, weights, nullptr);
      sums[i] = whole.value;
      if (BOUNDED<KIND>) {
        sums[i + sums_stride] = whole.excess;
        sums[i + 2 * sums_stride] = whole.room;
      }
    } else if (with_gradient) {
      whole.value = sums[i];
      if (BOUNDED<KIND>) {
        whole.excess = sums[i + sums_stride];
        whole.room = sums[i + 2 * sums_stride];
      }
    }
    if (both && !along)
      write_kept<KIND>(s.row, room.data(), logits.width, whole, factor);
    else if (with_gradient && !along)
      write<KIND>(row, logits.width, weights, whole, factor);
    if (with_gradient) s.write_back(logits.width);
  }
}

}  // namespace

// As `passing.one_pass`, over rows `begin` to `end`.
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
