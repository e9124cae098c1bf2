// What happens between the products of attention: kernels for one head, all queries (rows) and some keys (columns).
#pragma once

#include <stdint.h>

namespace mask2former {
namespace cpu {

// The bias of these keys; rows are `stride` apart.
struct AttentionBias {
  const float* data;
  int64_t stride;
};

struct AttentionKernels {
  // Makes logits (rows, columns) weights, as far as they can be known: exp(logits + bias - largest) with the largest of
  // a row until here. Sums of weights and sums of values (rows, channels) until here are multiplied with what the new
  // `largest` makes of them, and those of these weights are added to the former.
  void (*add_weights)(float* logits, const AttentionBias&, int64_t rows, int64_t columns, float* largest, float* sums,
                      float* values, int64_t channels);
  // Makes logits the weights exp(logits + bias - log_sums), and `grads`, gradients of weights, those of logits:
  // weights * (grads - means), with the means (rows) of a row's gradients.
  void (*weights_and_gradients)(float* logits, float* grads, const AttentionBias&, int64_t rows, int64_t columns,
                                const float* log_sums, const float* means);
};

}  // namespace cpu
}  // namespace mask2former
