// Multi-scale deformable attention for one instruction set: included once by generic.cpp, avx2.cpp and avx512.cpp,
// each of which defines the number of float lanes (MSDA_LANES) and the kernel it defines (MSDA_KERNEL).
//
// Two kinds of code. Per point: plain loops over arrays with one entry per point, which the compiler vectorizes. Per
// channel: the vector types of GCC and clang, so that accumulators stay in registers.
#include <cstring>
#include <utility>

#include "msda.h"

namespace msda {
namespace {  // every instruction set has its own copy of all of this

constexpr int kLanes = MSDA_LANES;
constexpr int kCorners = 4;  // upper left, upper right, lower left, lower right
constexpr int kAllCorners = 15;
typedef float Vector __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

inline float sum(Vector v) {
  float lane[kLanes];
  memcpy(lane, &v, sizeof v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

// ---------------------------------------------------------------------------------------------------------------
// Per point

// Positions and weights of the points of one query and head, one entry per point.
struct Samples {
  alignas(64) int32_t row[kCorners][kMaxPoints];   // distance of the corner's channels from the first token, in floats
  alignas(64) float share[kCorners][kMaxPoints];   // weight of the point times bilinear weight of the corner
  alignas(64) int32_t corners[kMaxPoints];         // bit c is set if corner c lies on the map
  alignas(64) float weight[kMaxPoints], x[kMaxPoints], y[kMaxPoints];  // x, y: distance from the upper left corner
};

// Constants of all queries, and the reference points of the current one, repeated for each of its points.
struct Geometry {
  int count;  // points of a query and head on the chosen levels
  int first;  // the first of them among the points of all levels
  alignas(64) float width[kMaxPoints], height[kMaxPoints], scale_x[kMaxPoints], scale_y[kMaxPoints];
  alignas(64) float base_x[kMaxPoints], base_y[kMaxPoints];
  alignas(64) int32_t columns[kMaxPoints], rows[kMaxPoints], start[kMaxPoints];

  Geometry(const Problem& problem, int first_level, int last_level) {
    first = first_level * problem.points;
    count = (last_level - first_level) * problem.points;
    const bool fractions = problem.reference_points == nullptr;  // locations in 0..1 instead of pixels
    for (int j = 0; j < count; ++j) {
      const Level& level = problem.level[first_level + j / problem.points];
      width[j] = level.width;
      height[j] = level.height;
      columns[j] = level.width;
      rows[j] = level.height;
      start[j] = level.start - problem.level[first_level].start;
      scale_x[j] = fractions ? level.width : 1.f;
      scale_y[j] = fractions ? level.height : 1.f;
      base_x[j] = base_y[j] = -0.5f;
    }
  }

  // Convert the reference points of query q, (L, 2), to pixels.
  void place(const Problem& problem, int64_t b, int64_t q) {
    if (problem.reference_points == nullptr) return;
    const float* reference = problem.reference_points + b * problem.reference_batch + q * problem.levels * 2;
    const int first_level = first / problem.points;
    for (int j = 0, l = first_level; j < count; ++l) {
      const float x = reference[2 * l] * problem.level[l].width - 0.5f;
      const float y = reference[2 * l + 1] * problem.level[l].height - 0.5f;
      for (int p = 0; p < problem.points; ++p, ++j) {
        base_x[j] = x;
        base_y[j] = y;
      }
    }
  }
};

// exp(x) for x <= 0 to 1e-7 (Cephes: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]); NaN stays NaN.
inline float exponential(float x) {
  constexpr float kLowest = -87.3f;  // below it: 0 (torch gives a number under 1e-38)
  const float bounded = x < kLowest ? kLowest : x;
  const float shifted = bounded * 1.44269504f + 12582912.f;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - 12582912.f;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const int32_t exponent = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  memcpy(&power, &exponent, sizeof power);
  return x < kLowest ? 0.f : p * power;
}

// Softmax of `count` logits into `weight`; returns the logarithm of the sum of their exponentials.
inline float softmax(const float* logits, int count, float* weight) {
  const int whole = (count + kLanes - 1) / kLanes * kLanes;
  for (int j = 0; j < count; ++j) weight[j] = logits[j];
  for (int j = count; j < whole; ++j) weight[j] = -__builtin_inff();
  Vector highest = load(weight);
  for (int j = kLanes; j < whole; j += kLanes) {
    const Vector v = load(weight + j);
    highest = v > highest ? v : highest;
  }
  float largest = highest[0];
  for (int i = 1; i < kLanes; ++i) largest = highest[i] > largest ? highest[i] : largest;
  for (int j = 0; j < whole; ++j) weight[j] = exponential(weight[j] - largest);
  Vector total = {};
  for (int j = 0; j < whole; j += kLanes) total += load(weight + j);
  const float denominator = sum(total);
  const float inverse = 1.f / denominator;
  for (int j = 0; j < count; ++j) weight[j] *= inverse;
  return largest + __builtin_logf(denominator);
}

// Fill `samples` for points (x, y) of one query and head whose `weight` is known; a token takes `stride` floats.
// Points outside the map and NaN have no corners, so that nothing is ever read for them.
inline void sample(const Geometry& g, const float* points_xy, int32_t stride, Samples& samples) {
  for (int j = 0; j < g.count; ++j) {
    float x = points_xy[2 * j] * g.scale_x[j] + g.base_x[j];
    float y = points_xy[2 * j + 1] * g.scale_y[j] + g.base_y[j];
    const int inside = (x > -1.f) & (y > -1.f) & (x < g.width[j]) & (y < g.height[j]);  // false for NaN
    x = inside ? x : 0.f;
    y = inside ? y : 0.f;
    int32_t left = static_cast<int32_t>(x), top = static_cast<int32_t>(y);
    left -= x < static_cast<float>(left);  // floor
    top -= y < static_cast<float>(top);
    x -= static_cast<float>(left);
    y -= static_cast<float>(top);
    const int32_t right = left + 1, bottom = top + 1;
    const int has_left = left >= 0, has_right = right < g.columns[j], has_top = top >= 0, has_bottom = bottom < g.rows[j];
    samples.corners[j] = inside * (has_left * has_top + 2 * has_right * has_top + 4 * has_left * has_bottom +
                                   8 * has_right * has_bottom);
    const int32_t upper = g.start[j] + top * g.columns[j], lower = upper + g.columns[j];
    samples.row[0][j] = (upper + left) * stride;
    samples.row[1][j] = (upper + right) * stride;
    samples.row[2][j] = (lower + left) * stride;
    samples.row[3][j] = (lower + right) * stride;
    const float above = samples.weight[j] * (1.f - y), below = samples.weight[j] * y;
    samples.share[0][j] = above * (1.f - x);
    samples.share[1][j] = above * x;
    samples.share[2][j] = below * (1.f - x);
    samples.share[3][j] = below * x;
    samples.x[j] = x;
    samples.y[j] = y;
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Forward

// out[0..Channels) = sum over points and corners of share * value.
template <int Channels>
inline void gather(const Samples& samples, int count, const float* value, float* out) {
  constexpr int kVectors = Channels / kLanes;
  constexpr int kChains = kVectors >= 8 ? 1 : kVectors >= 4 ? 2 : 4;  // 8 independent additions hide their latency
  Vector total[kChains][kVectors] = {};
  for (int j = 0; j < count; ++j) {
    const int corners = samples.corners[j];
    if (__builtin_expect(corners == kAllCorners, 1)) {
      for (int c = 0; c < kCorners; ++c) {
        const float* row = value + samples.row[c][j];
        for (int v = 0; v < kVectors; ++v) total[c % kChains][v] += samples.share[c][j] * load(row + v * kLanes);
      }
    } else if (corners != 0) {
      for (int c = 0; c < kCorners; ++c) {
        if (!(corners >> c & 1)) continue;
        const float* row = value + samples.row[c][j];
        for (int v = 0; v < kVectors; ++v) total[c % kChains][v] += samples.share[c][j] * load(row + v * kLanes);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    Vector all = total[0][v];
    for (int chain = 1; chain < kChains; ++chain) all += total[chain][v];
    store(out + v * kLanes, all);
  }
}

inline void forward_query_head(const Problem& problem, const Geometry& g, Samples& samples, const float* value,
                               int32_t stride, int64_t b, int64_t q, int64_t m) {
  const float* weights = problem.weights + b * problem.weights_batch + q * problem.weights_row + m * g.count;
  const float* points_xy = problem.points_xy + b * problem.points_batch + q * problem.points_row + m * g.count * 2;
  const int64_t row = (b * problem.queries + q) * problem.heads + m;
  if (problem.lse != nullptr)
    problem.lse[row] = softmax(weights, g.count, samples.weight);
  else
    memcpy(samples.weight, weights, g.count * sizeof(float));
  sample(g, points_xy, stride, samples);
  float* out = problem.out + row * problem.channels;
  int64_t channel = 0;
  for (; channel + 32 <= problem.channels; channel += 32) gather<32>(samples, g.count, value + channel, out + channel);
  if (channel < problem.channels) gather<16>(samples, g.count, value + channel, out + channel);
}

void forward_queries(const Problem& problem, int64_t b, int64_t first, int64_t last) {
  Geometry g(problem, 0, problem.levels);
  Samples samples;
  const int32_t stride = problem.heads * problem.channels;
  const float* value = problem.value + b * problem.tokens * stride;
  for (int64_t q = first; q < last; ++q) {
    g.place(problem, b, q);
    for (int64_t m = 0; m < problem.heads; ++m)
      forward_query_head(problem, g, samples, value + m * problem.channels, stride, b, q, m);
  }
}

void forward_head(const Problem& problem, const float* packed, int64_t b, int64_t m, int64_t first, int64_t last) {
  Geometry g(problem, 0, problem.levels);
  Samples samples;
  for (int64_t q = first; q < last; ++q) {
    g.place(problem, b, q);
    forward_query_head(problem, g, samples, packed, problem.channels, b, q, m);
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Backward

constexpr int kGroup = kLanes / kCorners;  // points whose four dot products fill one vector

// One step of a transposing sum: of every block of 2 * Half lanes, `a` gives the first half and `b` the second, each
// the sum of its two halves.
template <int Half, int... Lane>
inline Vector fold(Vector a, Vector b, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(a, b, (Lane % (2 * Half) < Half ? Lane : kLanes + Lane - Half)...) +
         __builtin_shufflevector(a, b, (Lane % (2 * Half) < Half ? Lane + Half : kLanes + Lane)...);
}

// Lane i of the result is the sum over the lanes of rows[i].
template <int Half = kLanes / 2>
inline Vector sums(Vector* rows) {
  for (int i = 0; i < Half; ++i)
    rows[i] = fold<Half>(rows[i], rows[i + Half], std::make_integer_sequence<int, kLanes>());
  if constexpr (Half > 1)
    return sums<Half / 2>(rows);
  else
    return rows[0];
}

// products[c][j] += <grad, value of corner c of point j>, and the gradient of that value += share * grad.
template <int Channels>
inline void scatter(const Samples& samples, int count, const float* value, float* grad_value, const float* grad,
                    float (*products)[kMaxPoints]) {
  constexpr int kVectors = Channels / kLanes;
  Vector g[kVectors];
  for (int v = 0; v < kVectors; ++v) g[v] = load(grad + v * kLanes);
  for (int first = 0; first < count; first += kGroup) {
    Vector dot[kLanes];
    for (int p = 0; p < kGroup; ++p) {
      const int j = first + p;
      const int corners = j < count ? samples.corners[j] : 0;
      for (int c = 0; c < kCorners; ++c) {
        Vector product = {};
        if (corners >> c & 1) {
          const int32_t row = samples.row[c][j];
          const float share = samples.share[c][j];
          for (int v = 0; v < kVectors; ++v) {
            product += g[v] * load(value + row + v * kLanes);
            float* target = grad_value + row + v * kLanes;
            store(target, load(target) + share * g[v]);
          }
        }
        dot[c * kGroup + p] = product;
      }
    }
    const Vector total = sums(dot);
    for (int c = 0; c < kCorners; ++c)
      for (int p = 0; p < kGroup; ++p) products[c][first + p] += total[c * kGroup + p];
  }
}

// Gradients of the points and weights of one query and head from the dot products of its corners.
inline void point_gradients(const Geometry& g, const Samples& samples, const float (*products)[kMaxPoints],
                            bool softmaxed, float delta, float* grad_points, float* grad_weights) {
  for (int j = 0; j < g.count; ++j) {
    const float x = samples.x[j], y = samples.y[j], weight = samples.weight[j];
    const float upper = (1.f - x) * products[0][j] + x * products[1][j];
    const float lower = (1.f - x) * products[2][j] + x * products[3][j];
    const float left = (1.f - y) * products[0][j] + y * products[2][j];
    const float right = (1.f - y) * products[1][j] + y * products[3][j];
    const float sampled = (1.f - y) * upper + y * lower;
    grad_points[2 * j] = weight * (right - left) * g.scale_x[j];
    grad_points[2 * j + 1] = weight * (lower - upper) * g.scale_y[j];
    grad_weights[j] = softmaxed ? weight * (sampled - delta) : sampled;
  }
}

void backward_head(const Problem& problem, float* scratch, int64_t b, int64_t m, int first_level, int last_level) {
  Geometry g(problem, first_level, last_level);
  Samples samples;
  alignas(64) float products[kCorners][kMaxPoints];
  const int64_t channels = problem.channels, width = problem.heads * channels;
  const int all = problem.levels * problem.points;
  const Level& end = problem.level[last_level - 1];
  const int64_t start = problem.level[first_level].start, tokens = end.start + int64_t(end.height) * end.width - start;
  const int64_t corner = (b * problem.tokens + start) * width + m * channels;  // this head on the first token
  // With scratch, each token's values and gradients lie side by side in it; without, both stay in place.
  const float* value = scratch != nullptr ? scratch : problem.value + corner;
  float* grad_value = scratch != nullptr ? scratch + channels : problem.grad_value + corner;
  const int64_t stride = scratch != nullptr ? 2 * channels : width;
  for (int64_t s = 0; s < tokens; ++s) {
    if (scratch != nullptr) memcpy(scratch + s * stride, problem.value + corner + s * width, channels * sizeof(float));
    memset(grad_value + s * stride, 0, channels * sizeof(float));
  }
  const bool softmaxed = problem.lse != nullptr;
  for (int64_t q = 0; q < problem.queries; ++q) {
    const int64_t row = (b * problem.queries + q) * problem.heads + m;
    const float* weights = problem.weights + b * problem.weights_batch + q * problem.weights_row + m * all + g.first;
    const float* points_xy =
        problem.points_xy + b * problem.points_batch + q * problem.points_row + (m * all + g.first) * 2;
    const float* grad = problem.grad + row * channels;
    float delta = 0.f;  // <grad, out>: subtracted by the softmax's gradient, whatever levels are computed
    if (softmaxed) {
      const float lse = problem.lse[row];
      for (int j = 0; j < g.count; ++j) samples.weight[j] = exponential(weights[j] - lse);
      Vector total = {};
      for (int64_t d = 0; d < channels; d += kLanes) total += load(grad + d) * load(problem.out + row * channels + d);
      delta = sum(total);
    } else {
      memcpy(samples.weight, weights, g.count * sizeof(float));
    }
    g.place(problem, b, q);
    sample(g, points_xy, stride, samples);
    memset(products, 0, sizeof products);
    int64_t d = 0;
    for (; d + 32 <= channels; d += 32) scatter<32>(samples, g.count, value + d, grad_value + d, grad + d, products);
    if (d < channels) scatter<16>(samples, g.count, value + d, grad_value + d, grad + d, products);
    const int64_t target = row * all + g.first;
    point_gradients(g, samples, products, softmaxed, delta, problem.grad_points + target * 2,
                    problem.grad_weights + target);
  }
  if (scratch == nullptr) return;
  for (int64_t s = 0; s < tokens; ++s)
    memcpy(problem.grad_value + corner + s * width, grad_value + s * stride, channels * sizeof(float));
}

}  // namespace

extern const Kernel MSDA_KERNEL = {MSDA_NAME, forward_queries, forward_head, backward_head};

}  // namespace msda
