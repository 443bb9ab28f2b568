// Checks, memory, threads and the choice of the instruction set. Uses the stable ABI of torch only, so that one library
// works with every torch from 2.11 on.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../torch-ext/torch_binding.h"
#include "msda.h"

using torch::stable::Tensor;

namespace msda {
namespace {

constexpr int64_t kQueriesPerTask = 64;       // all heads, original layout
constexpr int64_t kQueriesPerHeadTask = 256;  // one head, packed

// The channels of a head are M * D floats apart from token to token, which wastes most cache sets. Packing each head's
// values pays when each token is read often enough; in the forward pass only when one query with all its heads touches
// more rows than the caches hold (measured on AVX-512: decoder of UN-EPT 2.4 times faster packed, encoder of
// Deformable DETR 1.3 times slower forward and 1.6 times faster backward).
constexpr int64_t kReadsThatPayPacking = 16;
constexpr int64_t kPointsThatPayPackingForward = 32;

bool supported(const Kernel& kernel) {
#if defined(__x86_64__)
  if (&kernel == &avx512_kernel)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&kernel == &avx2_kernel) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernel == &generic_kernel;
}

std::vector<const Kernel*> supported_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  for (const Kernel* kernel : {&avx512_kernel, &avx2_kernel})
    if (supported(*kernel)) kernels.push_back(kernel);
#endif
  kernels.push_back(&generic_kernel);
  return kernels;
}

const Kernel* chosen = supported_kernels().front();

struct Free {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Buffer = std::unique_ptr<float[], Free>;

Buffer allocate(int64_t floats) {
  return Buffer(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
}

void check_float(const Tensor& tensor, const char* name, int64_t dimensions) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == torch::headeronly::ScalarType::Float, name,
                  " has to be a float32 tensor on the CPU");
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, " has ", tensor.dim(), " dimensions, ", dimensions, " are needed");
}

void check_contiguous(const Tensor& tensor, const char* name, int64_t dimensions, int64_t numbers) {
  check_float(tensor, name, dimensions);
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == numbers, name, " has to be contiguous with ", numbers,
                  " numbers, ", tensor.numel(), " were given");
}

// Sizes and inputs of a call, checked so that no later arithmetic can leave a tensor.
Problem describe(const Tensor& value, const Tensor& points, const Tensor& weights,
                 const std::optional<Tensor>& reference_points, const std::vector<int64_t>& spatial_shapes) {
  check_float(points, "points", 6);
  check_float(weights, "weights", 5);
  check_float(value, "value", 4);
  Problem problem = {};
  problem.batch = value.size(0);
  problem.tokens = value.size(1);
  problem.heads = value.size(2);
  problem.channels = value.size(3);
  problem.queries = points.size(1);
  const int64_t levels = points.size(3), per_level = points.size(4), all = levels * per_level;
  STD_TORCH_CHECK(levels <= kMaxLevels && all <= kMaxPoints && all > 0, "1 to ", kMaxLevels, " levels and ", kMaxPoints,
                  " points per head are served, ", levels, " levels and ", all, " points were given");
  STD_TORCH_CHECK(problem.channels % 16 == 0 && problem.channels > 0,
                  "the channels of a head have to be a multiple of 16, ", problem.channels, " were given");
  STD_TORCH_CHECK(problem.tokens * problem.heads * problem.channels < (int64_t(1) << 30),
                  "one image has more than 2^30 values");
  problem.levels = levels;
  problem.points = per_level;
  STD_TORCH_CHECK(int64_t(spatial_shapes.size()) == 2 * levels, "spatial_shapes needs 2 numbers per level");
  int64_t tokens = 0;
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= problem.tokens && width <= problem.tokens,
                    "level ", l, " is ", height, " x ", width, " for a value of ", problem.tokens, " tokens");
    problem.level[l] = {int32_t(height), int32_t(width), tokens};
    tokens += height * width;
  }
  STD_TORCH_CHECK(tokens == problem.tokens, "the levels have ", tokens, " tokens, value has ", problem.tokens);
  check_contiguous(value, "value", 4, problem.batch * tokens * problem.heads * problem.channels);
  for (int64_t d = 0; d < 5; ++d)
    STD_TORCH_CHECK(points.size(d) == weights.size(d), "points and weights differ in size ", d);
  STD_TORCH_CHECK(points.size(0) == problem.batch && points.size(2) == problem.heads && points.size(5) == 2,
                  "points have to be (batch, queries, heads, levels, points, 2)");
  STD_TORCH_CHECK(points.stride(5) == 1 && points.stride(4) == 2 && points.stride(3) == 2 * per_level &&
                      points.stride(2) == 2 * all && weights.stride(4) == 1 && weights.stride(3) == per_level &&
                      weights.stride(2) == all,
                  "points and weights of one query have to be contiguous");
  problem.value = value.const_data_ptr<float>();
  problem.points_xy = points.const_data_ptr<float>();
  problem.points_batch = points.stride(0);
  problem.points_row = points.stride(1);
  problem.weights = weights.const_data_ptr<float>();
  problem.weights_batch = weights.stride(0);
  problem.weights_row = weights.stride(1);
  if (reference_points) {
    const int64_t images = reference_points->size(0), numbers = problem.queries * levels * 2;
    STD_TORCH_CHECK(images == 1 || images == problem.batch, "reference points are for ", images, " images");
    check_contiguous(*reference_points, "reference_points", 4, images * numbers);
    problem.reference_points = reference_points->const_data_ptr<float>();
    problem.reference_batch = images == 1 ? 0 : numbers;
  }
  return problem;
}

bool packing_pays(const Problem& problem) {
  return problem.queries * problem.levels * problem.points >= kReadsThatPayPacking * problem.tokens;
}

// Copy image b from (S, M, D) to (M, S, D).
void pack(const Problem& problem, int64_t b, float* packed) {
  const int64_t channels = problem.channels, heads = problem.heads, tokens = problem.tokens;
  const float* image = problem.value + b * tokens * heads * channels;
  torch::stable::parallel_for(0, tokens, 1024, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s)
      for (int64_t m = 0; m < heads; ++m)
        memcpy(packed + (m * tokens + s) * channels, image + (s * heads + m) * channels, channels * sizeof(float));
  });
}

void forward_packed(const Problem& problem, const Kernel& kernel) {
  const int64_t head_size = problem.tokens * problem.channels;
  const int64_t blocks = (problem.queries + kQueriesPerHeadTask - 1) / kQueriesPerHeadTask;
  const Buffer packed = allocate(problem.heads * head_size);
  for (int64_t b = 0; b < problem.batch; ++b) {
    pack(problem, b, packed.get());
    torch::stable::parallel_for(0, problem.heads * blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        const int64_t m = task / blocks, q = task % blocks * kQueriesPerHeadTask;
        kernel.forward_head(problem, packed.get() + m * head_size, b, m, q,
                            std::min(q + kQueriesPerHeadTask, problem.queries));
      }
    });
  }
}

void forward_unpacked(const Problem& problem, const Kernel& kernel) {
  const int64_t blocks = (problem.queries + kQueriesPerTask - 1) / kQueriesPerTask;
  torch::stable::parallel_for(0, problem.batch * blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t q = task % blocks * kQueriesPerTask;
      kernel.forward_queries(problem, task / blocks, q, std::min(q + kQueriesPerTask, problem.queries));
    }
  });
}

}  // namespace
}  // namespace msda

std::tuple<Tensor, Tensor> ms_deform_attn_forward(const Tensor& value, const Tensor& points, const Tensor& weights,
                                                  const std::optional<Tensor>& reference_points,
                                                  const std::vector<int64_t>& spatial_shapes) {
  using namespace msda;
  Problem problem = describe(value, points, weights, reference_points, spatial_shapes);
  Tensor out = torch::stable::new_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels});
  Tensor lse = torch::stable::new_empty(
      value, {reference_points ? problem.batch : 0, problem.queries, problem.heads});
  problem.out = out.mutable_data_ptr<float>();
  problem.lse = reference_points ? lse.mutable_data_ptr<float>() : nullptr;
  if (packing_pays(problem) && problem.levels * problem.points >= kPointsThatPayPackingForward)
    forward_packed(problem, *chosen);
  else
    forward_unpacked(problem, *chosen);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(const Tensor& grad, const Tensor& value,
                                                           const Tensor& points, const Tensor& weights,
                                                           const std::optional<Tensor>& reference_points,
                                                           const std::vector<int64_t>& spatial_shapes,
                                                           const Tensor& out, const Tensor& lse) {
  using namespace msda;
  Problem problem = describe(value, points, weights, reference_points, spatial_shapes);
  const int64_t numbers = problem.batch * problem.queries * problem.heads * problem.channels;
  check_contiguous(grad, "grad", 3, numbers);
  problem.grad = grad.const_data_ptr<float>();
  if (reference_points) {
    check_contiguous(out, "out", 3, numbers);
    check_contiguous(lse, "lse", 3, numbers / problem.channels);
    problem.out = const_cast<float*>(out.const_data_ptr<float>());
    problem.lse = const_cast<float*>(lse.const_data_ptr<float>());
  }
  Tensor grad_value = torch::stable::new_empty(value, value.sizes());
  Tensor grad_points = torch::stable::new_empty(points, points.sizes());
  Tensor grad_weights = torch::stable::new_empty(weights, weights.sizes());
  problem.grad_value = grad_value.mutable_data_ptr<float>();
  problem.grad_points = grad_points.mutable_data_ptr<float>();
  problem.grad_weights = grad_weights.mutable_data_ptr<float>();
  // Each task owns the gradients of its levels, so that no two threads ever add to the same number: the result is the
  // same, bit for bit, for any number of threads and any assignment of the levels.
  const bool split = problem.batch * problem.heads < 2 * int64_t(torch::stable::get_num_threads());
  const int64_t parts = split ? problem.levels : 1, tasks = problem.batch * problem.heads * parts;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const Buffer scratch = packing_pays(problem) ? allocate(2 * problem.tokens * problem.channels) : nullptr;
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / parts, level = task % parts;
      chosen->backward_head(problem, scratch.get(), head / problem.heads, head % problem.heads, split ? level : 0,
                            split ? level + 1 : problem.levels);
    }
  });
  return {grad_value, grad_points, grad_weights};
}

std::string ms_deform_attn_instruction_set(std::string name) {
  using namespace msda;
  for (const Kernel* kernel : supported_kernels())
    if (name == kernel->name) chosen = kernel;
  STD_TORCH_CHECK(name.empty() || name == chosen->name, "this processor has no instruction set ", name);
  return chosen->name;
}
