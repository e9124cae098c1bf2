// Position-wise layers on CPU tensors: blocks of positions go through all products and what is between them on one
// thread each, in memory that its second cache holds.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernel.h"
#include "matrices.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

// Of a block at most, in float32 with 1024 hidden features a megabyte; products of fewer are slower, and gradients of
// weights are read and written once a block.
constexpr int64_t BLOCK_ROWS = 256;

// Rows [first, last).
struct Block {
  int64_t first, last, index, share;

  int64_t rows() const { return last - first; }
};

// Rows in blocks, and blocks in shares, one for each thread at most. Which rows are in which share, and in which order,
// depends on the numbers of rows and threads alone.
class Blocks {
 public:
  explicit Blocks(int64_t all_rows) : all_rows_(all_rows) {
    const int64_t threads = at::get_num_threads();
    // As many blocks for each thread, so that none waits for another's last one.
    const int64_t of_each_thread = std::max<int64_t>(1, divide_up(all_rows, BLOCK_ROWS * threads));
    rows_ = std::max<int64_t>(1, divide_up(all_rows, of_each_thread * threads));
    blocks_ = divide_up(all_rows, rows_);
    shares_ = std::min(threads, blocks_);
  }

  int64_t count() const { return blocks_; }
  int64_t shares() const { return shares_; }

  // Calls function(block, workspace) for all blocks, on all threads. A workspace has `floats` for each row of a block.
  template <typename Function>
  void run(int64_t floats, Function function) const {
    at::parallel_for(0, shares_, 1, [&](int64_t begin, int64_t end) {
      Memory workspace(size_t(rows_ * floats) * sizeof(float));
      float* const numbers = static_cast<float*>(workspace.get());
      for (int64_t share = begin; share < end; ++share)
        for (int64_t i = share * blocks_ / shares_; i < (share + 1) * blocks_ / shares_; ++i)
          function(Block{i * rows_, std::min(all_rows_, (i + 1) * rows_), i, share}, numbers);
    });
  }

 private:
  int64_t all_rows_, rows_, blocks_, shares_;
};

std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.contiguous());
  return result;
}

// Gradients of parameters, added up. Each share of blocks has its own of matrices, so that no threads meet. Each block
// has its own of vectors, whose sums have fewer numbers one after another then, and which kernels make along with
// something else, whether they are needed or not.
class GradientSums {
 public:
  GradientSums(const std::vector<Tensor>& parameters, const std::vector<bool>& needed, const Blocks& blocks)
      : needed_(needed.end() - int64_t(parameters.size()), needed.end()) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      std::vector<int64_t> sizes = parameters[i].sizes().vec();
      sizes.insert(sizes.begin(), sizes.size() == 1 ? blocks.count() : needed_[i] ? blocks.shares() : 0);
      sums_.push_back(at::zeros(sizes, parameters[i].options()));
      data_.push_back(sums_.back().mutable_data_ptr<float>());
      steps_.push_back(parameters[i].numel());
    }
  }

  float* of_vector(size_t parameter, const Block& block) const {
    return data_[parameter] + block.index * steps_[parameter];
  }

  // That of a weight (M, C) which of rows (n, C) made something with the gradient grad (n, M).
  void add_weight(size_t parameter, const Block& block, const Tensor& grad, const Tensor& rows) const {
    if (needed_[parameter]) add_product(grad.t(), rows, data_[parameter] + block.share * steps_[parameter]);
  }

  // Those that are needed, in order.
  void append_totals(std::vector<Tensor>& results) const {
    for (size_t i = 0; i < sums_.size(); ++i)
      if (needed_[i]) results.push_back(sums_[i].sum(0));
  }

 private:
  std::vector<bool> needed_;
  std::vector<Tensor> sums_;
  std::vector<float*> data_;
  std::vector<int64_t> steps_;
};

// Of layers that see x (B, S, C) or x + position.
struct ProjectionArguments {
  ProjectionArguments(const Tensor& x, const Tensor& position, at::TensorList weights) {
    TORCH_CHECK(x.dim() == 3, "x must be (B, S, C), but has shape ", x.sizes());
    batch = x.size(0), positions = x.size(1), channels = x.size(2);
    check(x, x.sizes(), "x");
    TORCH_CHECK(position.dim() == 3 && (position.size(0) == batch || position.size(0) == 1),
                "position must be (B or 1, S, C) with B ", batch, ", but has shape ", position.sizes());
    check(position, {position.size(0), positions, channels}, "position");
    TORCH_CHECK(!weights.empty(), "there must be weights of one layer or more");
    for (const Tensor& weight : weights) {
      TORCH_CHECK(weight.dim() == 2, "weights must be matrices, but one has shape ", weight.sizes());
      check(weight, {weight.size(0), channels}, "weights");
    }
    this->x = x.contiguous();
    this->position = position.contiguous();
    this->weights = contiguous(weights);
    x_data = this->x.const_data_ptr<float>();
    position_data = this->position.const_data_ptr<float>();
  }

  // Rows of x + position.
  void place(const Block& block, float* placed) const {
    const int64_t cycle = position.size(0) * positions;  // rows of position
    for (int64_t row = block.first; row < block.last; ++row, placed += channels)
      for (int64_t c = 0; c < channels; ++c)
        placed[c] = x_data[row * channels + c] + position_data[row % cycle * channels + c];
  }

  int64_t batch, positions, channels;
  Tensor x, position;
  std::vector<Tensor> weights;
  const float* x_data;
  const float* position_data;
};

std::vector<Tensor> project_positions(const Tensor& x, const Tensor& position, at::TensorList weights,
                                      at::TensorList biases_) {
  const ProjectionArguments all(x, position, weights);
  TORCH_CHECK(weights.size() == biases_.size(), "there must be as many biases as weights, ", weights.size(),
              ", but there are ", biases_.size());
  const std::vector<Tensor> biases = contiguous(biases_);
  std::vector<Tensor> results;
  std::vector<float*> to;
  for (size_t i = 0; i < biases.size(); ++i) {
    const int64_t columns = weights[i].size(0);
    check(biases[i], {columns}, "biases");
    results.push_back(at::empty({all.batch, all.positions, columns}, all.x.options()));
    to.push_back(results[i].mutable_data_ptr<float>());
  }
  const int64_t channels = all.channels;
  const Blocks blocks(all.batch * all.positions);
  blocks.run(channels, [&](const Block& block, float* placed) {
    all.place(block, placed);
    for (size_t i = 0; i < biases.size(); ++i) {
      const int64_t columns = biases[i].size(0);
      float* const result = to[i] + block.first * columns;
      multiply(matrix(i == 0 ? all.x_data + block.first * channels : placed, block.rows(), channels),
               matrix(all.weights[i]).t(), result);
      kernels().position_wise.add_bias(result, biases[i].const_data_ptr<float>(), block.rows(), columns);
    }
  });
  return results;
}

std::vector<Tensor> project_positions_backward(at::TensorList grads_, const Tensor& x, const Tensor& position,
                                               at::TensorList weights, const c10::List<bool>& needed_) {
  const std::vector<bool> needed = needed_.vec();
  const ProjectionArguments all(x, position, weights);
  const size_t count = weights.size();
  TORCH_CHECK(grads_.size() == count && needed.size() == 2 + 2 * count, "there must be ", count, " grads and ",
              2 + 2 * count, " needed, but there are ", grads_.size(), " and ", needed.size());
  const std::vector<Tensor> grads = contiguous(grads_);
  std::vector<Tensor> parameters = all.weights;
  for (size_t i = 0; i < count; ++i) {
    check(grads[i], {all.batch, all.positions, weights[i].size(0)}, "grads");
    parameters.push_back(at::empty({weights[i].size(0)}, all.x.options()));
  }
  const Blocks blocks(all.batch * all.positions);
  const GradientSums sums(parameters, needed, blocks);
  const Tensor grad_x = at::empty(all.x.sizes(), all.x.options());
  const Tensor grad_placed = needed[1] ? at::empty(all.x.sizes(), all.x.options()) : grad_x;
  float* const to_x = grad_x.mutable_data_ptr<float>();
  float* const to_placed = grad_placed.mutable_data_ptr<float>();
  const int64_t channels = all.channels;
  blocks.run(channels, [&](const Block& block, float* placed) {
    const int64_t rows = block.rows(), start = block.first * channels, end = block.last * channels;
    all.place(block, placed);
    std::vector<Tensor> here;
    for (size_t i = 0; i < count; ++i) {
      const int64_t columns = weights[i].size(0);
      const float* const grad = grads[i].const_data_ptr<float>() + block.first * columns;
      here.push_back(matrix(grad, rows, columns));
      sums.add_weight(i, block, here[i], matrix(i == 0 ? all.x_data + start : placed, rows, channels));
      kernels().position_wise.add_rows(grad, sums.of_vector(count + i, block), rows, columns);
    }
    // What the sum of x and position gets is the position's gradient, and a part of that of x.
    std::fill(to_placed + start, to_placed + end, 0.0f);
    for (size_t i = 1; i < count; ++i) add_product(here[i], matrix(all.weights[i]), to_placed + start);
    if (to_x != to_placed) std::copy(to_placed + start, to_placed + end, to_x + start);
    add_product(here[0], matrix(all.weights[0]), to_x + start);
  });
  std::vector<Tensor> results;
  if (needed[0]) results.push_back(grad_x);
  if (needed[1]) results.push_back(all.position.size(0) == all.batch ? grad_placed : grad_placed.sum(0, true));
  sums.append_totals(results);
  return results;
}

// In the order in which they are used.
enum Parameter {
  OUTPUT,
  OUTPUT_BIAS,
  NORM1,
  NORM1_BIAS,
  LINEAR1,
  LINEAR1_BIAS,
  LINEAR2,
  LINEAR2_BIAS,
  NORM2,
  NORM2_BIAS,
  PARAMETERS
};

// Parameters of what comes after attention.
struct FeedForwardParameters {
  FeedForwardParameters(at::TensorList parameters, int64_t channels, double eps1, double eps2) : channels(channels) {
    TORCH_CHECK(parameters.size() == PARAMETERS && parameters[LINEAR1].dim() == 2,
                "parameters must be weight and bias of five parts, the third a matrix, but are ", parameters.size());
    hidden = parameters[LINEAR1].size(0);
    tensors = contiguous(parameters);
    const std::vector<std::vector<int64_t>> shapes = {{channels, channels}, {channels}, {channels}, {channels},
                                                      {hidden, channels},   {hidden},   {channels, hidden},
                                                      {channels},           {channels}, {channels}};
    for (size_t i = 0; i < PARAMETERS; ++i) {
      check(tensors[i], shapes[i], "parameters");
      data.push_back(tensors[i].const_data_ptr<float>());
    }
    for (const Parameter weight : {OUTPUT, LINEAR1, LINEAR2}) transposed[weight] = tensors[weight].t().contiguous();
    norm1 = {data[NORM1], data[NORM1_BIAS], float(eps1)};
    norm2 = {data[NORM2], data[NORM2_BIAS], float(eps2)};
  }

  // Hidden features (n, F) of rows (n, C).
  void make_hidden(const Tensor& rows, float* features) const {
    multiply(rows, matrix(transposed[LINEAR1]), features);
    kernels().position_wise.add_bias_and_relu(features, data[LINEAR1_BIAS], rows.size(0), hidden);
  }

  int64_t channels, hidden;
  std::vector<Tensor> tensors;
  std::vector<const float*> data;
  Tensor transposed[PARAMETERS];  // of weights, in which products find what they take side by side
  Norm norm1, norm2;
};

std::vector<Tensor> add_and_feed_forward(const Tensor& x_, const Tensor& attended_, at::TensorList parameters,
                                         double eps1, double eps2, bool with_sums) {
  TORCH_CHECK(x_.dim() == 3, "x must be (B, S, C), but has shape ", x_.sizes());
  const int64_t channels = x_.size(2);
  check(x_, x_.sizes(), "x");
  check(attended_, x_.sizes(), "attended");
  const FeedForwardParameters parts(parameters, channels, eps1, eps2);
  const Tensor x = x_.contiguous(), attended = attended_.contiguous();
  std::vector<Tensor> results;
  float* to[3];
  for (int i = 0; i < (with_sums ? 3 : 1); ++i) {
    results.push_back(at::empty(x.sizes(), x.options()));
    to[i] = results[i].mutable_data_ptr<float>();
  }
  const float* const residual = x.const_data_ptr<float>();
  const float* const added = attended.const_data_ptr<float>();
  const PositionWiseKernels& kernel = kernels().position_wise;
  const Blocks blocks(x.size(0) * x.size(1));
  blocks.run(channels + parts.hidden, [&](const Block& block, float* normed) {
    const int64_t rows = block.rows(), start = block.first * channels;
    float* const features = normed + rows * channels;
    float* const result = to[0] + start;
    float* const sum1 = with_sums ? to[1] + start : normed;
    float* const sum2 = with_sums ? to[2] + start : result;
    multiply(matrix(added + start, rows, channels), matrix(parts.transposed[OUTPUT]), sum1);
    kernel.add_and_norm(sum1, residual + start, parts.data[OUTPUT_BIAS], parts.norm1, normed, rows, channels);
    parts.make_hidden(matrix(normed, rows, channels), features);
    multiply(matrix(features, rows, parts.hidden), matrix(parts.transposed[LINEAR2]), sum2);
    kernel.add_and_norm(sum2, normed, parts.data[LINEAR2_BIAS], parts.norm2, result, rows, channels);
  });
  return results;
}

std::vector<Tensor> add_and_feed_forward_backward(const Tensor& grad_, const Tensor& sum1_, const Tensor& sum2_,
                                                  const Tensor& attended_, at::TensorList parameters, double eps1,
                                                  double eps2, const c10::List<bool>& needed_) {
  const std::vector<bool> needed = needed_.vec();
  TORCH_CHECK(grad_.dim() == 3, "grad must be (B, S, C), but has shape ", grad_.sizes());
  const int64_t channels = grad_.size(2);
  check(grad_, grad_.sizes(), "grad");
  check(sum1_, grad_.sizes(), "sum1");
  check(sum2_, grad_.sizes(), "sum2");
  check(attended_, grad_.sizes(), "attended");
  const FeedForwardParameters parts(parameters, channels, eps1, eps2);
  TORCH_CHECK(needed.size() == 2 + PARAMETERS, "needed must be of 12 gradients, but is of ", needed.size());
  const int64_t hidden = parts.hidden;
  const Tensor grad = grad_.contiguous(), sum1 = sum1_.contiguous(), sum2 = sum2_.contiguous();
  const Tensor attended = attended_.contiguous();
  const Blocks blocks(grad.size(0) * grad.size(1));
  const GradientSums sums(parts.tensors, needed, blocks);
  const Tensor grad_x = at::empty(grad.sizes(), grad.options());
  const Tensor grad_attended = at::empty(needed[1] ? grad.sizes() : at::IntArrayRef{0}, grad.options());
  const float* const from = grad.const_data_ptr<float>();
  const float* const before1 = sum1.const_data_ptr<float>();
  const float* const before2 = sum2.const_data_ptr<float>();
  const float* const added = attended.const_data_ptr<float>();
  float* const to_x = grad_x.mutable_data_ptr<float>();
  float* const to_attended = grad_attended.mutable_data_ptr<float>();
  const PositionWiseKernels& kernel = kernels().position_wise;
  blocks.run(2 * (channels + hidden), [&](const Block& block, float* normed_rows) {
    const int64_t rows = block.rows(), start = block.first * channels;
    float* const of_normed = normed_rows + rows * channels;
    float* const feature_rows = of_normed + rows * channels;
    float* const of_features = feature_rows + rows * hidden;
    const auto sums_of = [&](Parameter vector) { return sums.of_vector(vector, block); };
    const NormSums sums1{sums_of(NORM1), sums_of(NORM1_BIAS), sums_of(OUTPUT_BIAS)};
    const NormSums sums2{sums_of(NORM2), sums_of(NORM2_BIAS), sums_of(LINEAR2_BIAS)};
    const Tensor normed = matrix(normed_rows, rows, channels), features = matrix(feature_rows, rows, hidden);
    const Tensor grad2 = matrix(of_normed, rows, channels), grad1 = matrix(to_x + start, rows, channels);
    const Tensor grad_features = matrix(of_features, rows, hidden);

    kernel.norm_backward(from + start, before2 + start, parts.norm2, of_normed, sums2, rows, channels);
    kernel.layer_norm(before1 + start, parts.norm1, normed_rows, rows, channels);
    parts.make_hidden(normed, feature_rows);
    sums.add_weight(LINEAR2, block, grad2, features);
    multiply(grad2, matrix(parts.tensors[LINEAR2]), of_features);
    kernel.relu_backward(of_features, feature_rows, sums_of(LINEAR1_BIAS), rows, hidden);
    sums.add_weight(LINEAR1, block, grad_features, normed);
    add_product(grad_features, matrix(parts.tensors[LINEAR1]), of_normed);
    kernel.norm_backward(of_normed, before1 + start, parts.norm1, to_x + start, sums1, rows, channels);
    sums.add_weight(OUTPUT, block, grad1, matrix(added + start, rows, channels));
    if (needed[1]) multiply(grad1, matrix(parts.tensors[OUTPUT]), to_attended + start);
  });
  std::vector<Tensor> results;
  if (needed[0]) results.push_back(grad_x);
  if (needed[1]) results.push_back(grad_attended);
  sums.append_totals(results);
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("project_positions", project_positions);
  m.impl("project_positions_backward", project_positions_backward);
  m.impl("add_and_feed_forward", add_and_feed_forward);
  m.impl("add_and_feed_forward_backward", add_and_feed_forward_backward);
}

}  // namespace cpu
}  // namespace mask2former
