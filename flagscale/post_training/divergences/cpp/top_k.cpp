// What `top_k_kl` needs of a slice of the vocabulary, and its gradient, a row at a time.
#include <functional>

#include "rows.h"

namespace {

constexpr int64_t FEW = 64;       // columns of which the largest logit is looked at first

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

extern "C" {

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
