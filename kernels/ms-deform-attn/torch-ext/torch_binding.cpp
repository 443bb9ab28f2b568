#include "torch_binding.h"

#include <torch/csrc/stable/library.h>

#include "registration.h"

// A build for CUDA has no compiled passes (Triton does them), and Python sees that there is no `forward`.
#if defined(CPU_KERNEL)

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def(
      "forward(Tensor value, Tensor points, Tensor weights, Tensor? reference_points, int[] spatial_shapes)"
      " -> (Tensor out, Tensor lse)");
  ops.def(
      "backward(Tensor grad, Tensor value, Tensor points, Tensor weights, Tensor? reference_points,"
      " int[] spatial_shapes, Tensor out, Tensor lse)"
      " -> (Tensor grad_value, Tensor grad_points, Tensor grad_weights)");
  ops.def("instruction_set(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("forward", TORCH_BOX(&ms_deform_attn_forward));
  ops.impl("backward", TORCH_BOX(&ms_deform_attn_backward));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("instruction_set", TORCH_BOX(&ms_deform_attn_instruction_set));
}

#endif  // CPU_KERNEL

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
