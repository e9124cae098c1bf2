// Position-wise layers on CPU tensors: blocks of positions go through all products and what is between them on one
// thread each, in memory that its second cache holds.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernel.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

// Of a block, in float32 with 1024 hidden features a megabyte; products of fewer are slower.
constexpr int64_t BLOCK_ROWS = 256;

void check(const Tensor& tensor, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.sizes() == sizes, name,
              " must be Float on a CPU and have shape ", sizes, ", but is ", tensor.scalar_type(), " on ",
              tensor.device(), " and has shape ", tensor.sizes());
}

// Calls function(first, last, workspace) for blocks of `count` rows, on all threads. A workspace has `floats` for each
// row of a block.
template <typename Function>
void for_blocks(int64_t count, int64_t floats, Function function) {
  const int64_t threads = at::get_num_threads();
  const int64_t rows = std::max<int64_t>(1, std::min(BLOCK_ROWS, divide_up(count, threads)));
  at::parallel_for(0, divide_up(count, rows), 1, [&](int64_t begin, int64_t end) {
    Memory workspace(size_t(rows * floats) * sizeof(float));
    float* const numbers = static_cast<float*>(workspace.get());
    for (int64_t block = begin; block < end; ++block)
      function(block * rows, std::min(count, (block + 1) * rows), numbers);
  });
}

// A matrix (rows, columns) in memory: a tensor of the thread that made it, whatever mode another one is in.
Tensor matrix(const float* data, int64_t rows, int64_t columns) {
  return at::from_blob(const_cast<float*>(data), {rows, columns}, at::TensorOptions(at::kFloat));
}

// x (n, columns of weight) times the transposed weight, without the layer's bias, to (n, rows of weight).
void product(const float* x, int64_t rows, const Tensor& weight, float* to) {
  const Tensor w = matrix(weight.const_data_ptr<float>(), weight.size(0), weight.size(1));
  Tensor result = matrix(to, rows, weight.size(0));
  at::mm_out(result, matrix(x, rows, weight.size(1)), w.t());
}

std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

std::vector<Tensor> project_positions(const Tensor& x_, const Tensor& position_, at::TensorList weights_,
                                      at::TensorList biases_) {
  TORCH_CHECK(x_.dim() == 3, "x must be (B, S, C), but has shape ", x_.sizes());
  const int64_t batch = x_.size(0), positions = x_.size(1), channels = x_.size(2);
  check(x_, x_.sizes(), "x");
  TORCH_CHECK(position_.dim() == 3 && (position_.size(0) == batch || position_.size(0) == 1),
              "position must be (B or 1, S, C) with B ", batch, ", but has shape ", position_.sizes());
  check(position_, {position_.size(0), positions, channels}, "position");
  TORCH_CHECK(!weights_.empty() && weights_.size() == biases_.size(),
              "weights and biases must be those of one layer or more, but are ", weights_.size(), " and ",
              biases_.size());
  const Tensor x = x_.contiguous(), position = position_.contiguous();
  const std::vector<Tensor> weights = contiguous(weights_), biases = contiguous(biases_);
  std::vector<Tensor> results;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK(weights[i].dim() == 2, "weights must be matrices, but one has shape ", weights[i].sizes());
    check(weights[i], {weights[i].size(0), channels}, "weights");
    check(biases[i], {weights[i].size(0)}, "biases");
    results.push_back(at::empty({batch, positions, weights[i].size(0)}, x.options()));
  }
  std::vector<float*> to;
  for (Tensor& result : results) to.push_back(result.mutable_data_ptr<float>());
  const float* const from = x.const_data_ptr<float>();
  const float* const placing = position.const_data_ptr<float>();
  const int64_t cycle = position.size(0) * positions;  // rows of position
  for_blocks(batch * positions, channels, [&](int64_t first, int64_t last, float* placed) {
    const int64_t rows = last - first;
    for (int64_t row = first; row < last; ++row)
      for (int64_t c = 0; c < channels; ++c)
        placed[(row - first) * channels + c] = from[row * channels + c] + placing[row % cycle * channels + c];
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t columns = weights[i].size(0);
      product(i == 0 ? from + first * channels : placed, rows, weights[i], to[i] + first * columns);
      kernels().position_wise.add_bias(to[i] + first * columns, biases[i].const_data_ptr<float>(), rows, columns);
    }
  });
  return results;
}

Tensor add_and_feed_forward(const Tensor& x_, const Tensor& attended_, at::TensorList parameters_, double eps1,
                            double eps2) {
  TORCH_CHECK(x_.dim() == 3, "x must be (B, S, C), but has shape ", x_.sizes());
  const int64_t channels = x_.size(2);
  check(x_, x_.sizes(), "x");
  check(attended_, x_.sizes(), "attended");
  TORCH_CHECK(parameters_.size() == 10 && parameters_[4].dim() == 2,
              "parameters must be weight and bias of five parts, the third a matrix, but are ", parameters_.size());
  const int64_t hidden = parameters_[4].size(0);
  const std::vector<Tensor> parameters = contiguous(parameters_);
  const std::vector<std::vector<int64_t>> shapes = {{channels, channels}, {channels}, {channels}, {channels},
                                                    {hidden, channels},   {hidden},   {channels, hidden},
                                                    {channels},           {channels}, {channels}};
  std::vector<const float*> data;
  for (size_t i = 0; i < parameters.size(); ++i) {
    check(parameters[i], shapes[i], "parameters");
    data.push_back(parameters[i].const_data_ptr<float>());
  }
  const Norm norm1{data[2], data[3], float(eps1)}, norm2{data[8], data[9], float(eps2)};
  const Tensor x = x_.contiguous(), attended = attended_.contiguous();
  Tensor result = at::empty(x.sizes(), x.options());
  float* const to = result.mutable_data_ptr<float>();
  const float* const residual = x.const_data_ptr<float>();
  const float* const added = attended.const_data_ptr<float>();
  const PositionWiseKernels& kernel = kernels().position_wise;
  for_blocks(x.size(0) * x.size(1), channels + hidden, [&](int64_t first, int64_t last, float* normed) {
    const int64_t rows = last - first, start = first * channels;
    float* const features = normed + rows * channels;
    product(added + start, rows, parameters[0], normed);
    kernel.add_and_norm(normed, residual + start, data[1], norm1, rows, channels);
    product(normed, rows, parameters[4], features);
    kernel.add_bias_and_relu(features, data[5], rows, hidden);
    product(features, rows, parameters[6], to + start);
    kernel.add_and_norm(to + start, normed, data[7], norm2, rows, channels);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("project_positions", project_positions);
  m.impl("add_and_feed_forward", add_and_feed_forward);
}

}  // namespace cpu
}  // namespace mask2former
