#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

// With reference points, `points` are offsets in pixels and `weights` are logits; without them, `points` are locations
// in 0..1 and `weights` are used as they are (and `lse` is empty).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> ms_deform_attn_forward(
    const torch::stable::Tensor& value, const torch::stable::Tensor& points, const torch::stable::Tensor& weights,
    const std::optional<torch::stable::Tensor>& reference_points, const std::vector<int64_t>& spatial_shapes);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> ms_deform_attn_backward(
    const torch::stable::Tensor& grad, const torch::stable::Tensor& value, const torch::stable::Tensor& points,
    const torch::stable::Tensor& weights, const std::optional<torch::stable::Tensor>& reference_points,
    const std::vector<int64_t>& spatial_shapes, const torch::stable::Tensor& out, const torch::stable::Tensor& lse);

// Name of the instruction set in use; a name that is not empty chooses one first.
std::string ms_deform_attn_instruction_set(std::string name);
