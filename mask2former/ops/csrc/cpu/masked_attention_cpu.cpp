// Attention of CPU tensors with a mask that all heads share: each head on one thread, some keys at a time, whose
// weights its second cache holds (Dao et al., "FlashAttention", NeurIPS 2022: largest logits and sums are corrected on
// the way).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "kernel.h"
#include "matrices.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

constexpr int64_t KEYS_AT_A_TIME = 1024;

// Rows of all heads beside each other in memory, (B, rows, M, D), as linear layers make and take them.
Tensor beside_each_other(const Tensor& x) { return x.transpose(1, 2).contiguous().transpose(1, 2); }
Tensor empty_beside_each_other(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

struct Attention {
  Attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias) {
    TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "query and key must be (B, M, Q or S, D), but have shapes ",
                query.sizes(), " and ", key.sizes());
    batch = query.size(0), heads = query.size(1), queries = query.size(2), channels = query.size(3);
    keys = key.size(2);
    check(query, query.sizes(), "query");
    check(key, {batch, heads, keys, channels}, "key");
    check(value, {batch, heads, keys, channels}, "value");
    TORCH_CHECK(bias.dim() == 4 && (bias.size(0) == batch || bias.size(0) == 1),
                "bias must be (B or 1, 1, Q, S) with B ", batch, ", but has shape ", bias.sizes());
    check(bias, {bias.size(0), 1, queries, keys}, "bias");
    this->query = beside_each_other(query);
    this->key = beside_each_other(key);
    this->value = beside_each_other(value);
    this->bias = bias.contiguous();
    stride = heads * channels;
    scale = 1.0f / std::sqrt(float(channels));
  }

  // Memory for one head: of a row for each query.
  int64_t floats(int64_t weights) const {
    return queries * (weights * std::min(keys, KEYS_AT_A_TIME) + 2 * channels + 2);
  }

  // Calls function(picture, head, memory) on all threads.
  template <typename Function>
  void for_heads(int64_t floats, Function function) const {
    at::parallel_for(0, batch * heads, 1, [&](int64_t begin, int64_t end) {
      Memory workspace(size_t(floats) * sizeof(float));
      for (int64_t i = begin; i < end; ++i)
        function(i / heads, i % heads, static_cast<float*>(workspace.get()));
    });
  }

  // Rows of a head in a tensor (B, M, rows, D) whose heads are beside each other, from `row` on.
  const float* at(const Tensor& x, int64_t picture, int64_t head, int64_t row = 0) const {
    return x.const_data_ptr<float>() + (picture * x.size(2) + row) * stride + head * channels;
  }
  Tensor rows(const Tensor& x, int64_t picture, int64_t head, int64_t row, int64_t count) const {
    return matrix(at(x, picture, head, row), count, channels, stride);
  }
  AttentionBias bias_of(int64_t picture, int64_t first_key) const {
    const int64_t place = bias.size(0) == 1 ? 0 : picture;
    return {bias.const_data_ptr<float>() + place * queries * keys + first_key, keys};
  }
  // Queries (Q, D) of a head, of which products with keys are logits.
  void scale_queries(int64_t picture, int64_t head, float* to) const {
    const float* from = at(query, picture, head);
    for (int64_t row = 0; row < queries; ++row, from += stride)
      for (int64_t c = 0; c < channels; ++c) *to++ = from[c] * scale;
  }

  int64_t batch, heads, queries, keys, channels, stride;
  float scale;
  Tensor query, key, value, bias;
};

std::tuple<Tensor, Tensor> masked_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& bias) {
  const Attention all(query, key, value, bias);
  const int64_t queries = all.queries, channels = all.channels;
  const Tensor output = empty_beside_each_other(query);
  const Tensor log_sums = at::empty({all.batch, all.heads, queries}, query.options());
  output.mutable_data_ptr<float>();
  float* const all_log_sums = log_sums.mutable_data_ptr<float>();
  const AttentionKernels& kernel = kernels().attention;
  all.for_heads(all.floats(1), [&](int64_t picture, int64_t head, float* scaled) {
    float* const values = scaled + queries * channels;
    float* const largest = values + queries * channels;
    float* const sums = largest + queries;
    float* const weights = sums + queries;
    all.scale_queries(picture, head, scaled);
    std::fill(values, values + queries * channels, 0.0f);
    std::fill(largest, largest + queries, -std::numeric_limits<float>::infinity());
    std::fill(sums, sums + queries, 0.0f);
    for (int64_t first = 0; first < all.keys; first += KEYS_AT_A_TIME) {
      const int64_t count = std::min(KEYS_AT_A_TIME, all.keys - first);
      const Tensor here = matrix(weights, queries, count, count);
      multiply(matrix(scaled, queries, channels, channels), all.rows(all.key, picture, head, first, count).t(), here);
      kernel.add_weights(weights, all.bias_of(picture, first), queries, count, largest, sums, values, channels);
      add_product(here, all.rows(all.value, picture, head, first, count), matrix(values, queries, channels, channels));
    }
    float* to = const_cast<float*>(all.at(output, picture, head));
    float* const logs = all_log_sums + (picture * all.heads + head) * queries;
    for (int64_t row = 0; row < queries; ++row, to += all.stride) {
      const bool attends = sums[row] != 0.0f;
      // A query that may attend to nothing gets 0, and so do all its gradients.
      logs[row] = attends ? largest[row] + std::log(sums[row]) : std::numeric_limits<float>::infinity();
      for (int64_t c = 0; c < channels; ++c) to[c] = attends ? values[row * channels + c] / sums[row] : 0.0f;
    }
  });
  return {output, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> masked_attention_backward(const Tensor& grad_, const Tensor& query,
                                                             const Tensor& key, const Tensor& value, const Tensor& bias,
                                                             const Tensor& output_, const Tensor& log_sums_) {
  const Attention all(query, key, value, bias);
  const int64_t queries = all.queries, channels = all.channels;
  check(grad_, query.sizes(), "grad");
  check(output_, query.sizes(), "output");
  check(log_sums_, {all.batch, all.heads, queries}, "log_sums");
  const Tensor grad = beside_each_other(grad_), output = beside_each_other(output_);
  const Tensor log_sums = log_sums_.contiguous();
  const Tensor grad_query = empty_beside_each_other(query), grad_key = empty_beside_each_other(key);
  const Tensor grad_value = empty_beside_each_other(value);
  for (const Tensor& result : {grad_query, grad_key, grad_value}) result.mutable_data_ptr<float>();
  const float* const all_log_sums = log_sums.const_data_ptr<float>();
  const AttentionKernels& kernel = kernels().attention;
  all.for_heads(all.floats(2), [&](int64_t picture, int64_t head, float* scaled) {
    float* const of_queries = scaled + queries * channels;
    float* const means = of_queries + queries * channels;
    float* const weights = means + queries;
    all.scale_queries(picture, head, scaled);
    std::fill(of_queries, of_queries + queries * channels, 0.0f);
    const float* change = all.at(grad, picture, head);
    const float* result = all.at(output, picture, head);
    for (int64_t row = 0; row < queries; ++row, change += all.stride, result += all.stride) {
      means[row] = 0.0f;
      for (int64_t c = 0; c < channels; ++c) means[row] += change[c] * result[c];
    }
    const Tensor scaled_rows = matrix(scaled, queries, channels, channels);
    const Tensor changes = all.rows(grad, picture, head, 0, queries);
    for (int64_t first = 0; first < all.keys; first += KEYS_AT_A_TIME) {
      const int64_t count = std::min(KEYS_AT_A_TIME, all.keys - first);
      float* const of_weights = weights + queries * count;
      const Tensor here = matrix(weights, queries, count, count), grads = matrix(of_weights, queries, count, count);
      const Tensor keys = all.rows(all.key, picture, head, first, count);
      multiply(scaled_rows, keys.t(), here);
      multiply(changes, all.rows(all.value, picture, head, first, count).t(), grads);
      kernel.weights_and_gradients(weights, of_weights, all.bias_of(picture, first), queries, count,
                                   all_log_sums + (picture * all.heads + head) * queries, means);
      multiply(here.t(), changes, all.rows(grad_value, picture, head, first, count));
      multiply(grads.t(), scaled_rows, all.rows(grad_key, picture, head, first, count));
      add_product(grads, keys, matrix(of_queries, queries, channels, channels));
    }
    float* to = const_cast<float*>(all.at(grad_query, picture, head));
    for (int64_t row = 0; row < queries; ++row, to += all.stride)
      for (int64_t c = 0; c < channels; ++c) to[c] = of_queries[row * channels + c] * all.scale;
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("masked_attention", masked_attention);
  m.impl("masked_attention_backward", masked_attention_backward);
}

}  // namespace cpu
}  // namespace mask2former
