// Interface between the parts of the CPU kernel. Plain data and pointers only: the files that are compiled for one
// instruction set must not emit inline functions of a library, which the linker might then pick for all of them.
#pragma once

#include <cstdint>

namespace msda {

constexpr int kMaxPoints = 256;   // points of one query and head over all levels
constexpr int kMaxLevels = 16;

struct Level {
  int32_t height, width;
  int64_t start;  // first token
};

// One call. Letters as in the Python module: B images, Q queries, S tokens, M heads, D channels, L levels, P points.
struct Problem {
  int64_t batch, queries, tokens, heads, channels;
  int levels, points;
  Level level[kMaxLevels];

  const float* value;             // (B, S, M, D)
  const float* points_xy;         // (B, Q, M, L, P, 2): offsets in pixels, or locations in 0..1 without reference points
  int64_t points_batch, points_row;  // distance in floats between images, between queries
  const float* weights;           // (B, Q, M, L, P): logits, or final weights without reference points
  int64_t weights_batch, weights_row;
  const float* reference_points;  // (B or 1, Q, L, 2), or null
  int64_t reference_batch;        // 0 where all images share them

  float* out;  // (B, Q, M, D); read by the backward pass
  float* lse;  // (B, Q, M): log of the sum of exp(logits); written forward, read backward; null without softmax

  const float* grad;    // (B, Q, M, D)
  float* grad_value;    // (B, S, M, D)
  float* grad_points;   // (B, Q, M, L, P, 2)
  float* grad_weights;  // (B, Q, M, L, P)
};

// The same code compiled for one instruction set.
struct Kernel {
  const char* name;
  // Queries [first, last) of image b, all heads, on the original layout.
  void (*forward_queries)(const Problem&, int64_t b, int64_t first, int64_t last);
  // Queries [first, last) of image b and head m, on that head's values packed to (S, D).
  void (*forward_head)(const Problem&, const float* packed, int64_t b, int64_t m, int64_t first, int64_t last);
  // All queries of image b and head m on levels [first, last); scratch holds 2 * D floats for each of their tokens,
  // or is null where packing does not pay.
  void (*backward_head)(const Problem&, float* scratch, int64_t b, int64_t m, int first, int last);
};

extern const Kernel generic_kernel;
#if defined(__x86_64__)
extern const Kernel avx2_kernel;
extern const Kernel avx512_kernel;
#endif

}  // namespace msda
