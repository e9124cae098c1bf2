// The CUDA kernels as functions of a library of the host, for ctypes.
#include "cuda_on_host.h"

#include "kernels.cuh"

using namespace mask2former::cuda;
using mask2former::Type;

namespace {

struct Launch {
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, Arguments... arguments) const {
    cuda_on_host::launch(kernel, static_cast<unsigned>(blocks), threads_per_block, arguments...);
  }
};

}  // namespace

// As `Problem` and `Gradients`, with types of which the offsets are easily known from outside.
struct Call {
  int64_t value_type;  // number of the enumerator of Type
  int64_t batch, positions, queries, heads, channels, levels, points;
  const Level* level;  // (L): height, width, start
  const void* value;
  int64_t value_stride[3];
  const void* reference_points;
  int64_t reference_stride[2];
  const void* sampling;
  int64_t sampling_stride[3];
  const void* attention;
  int64_t attention_stride[3];
  void* output;  // of the forward pass; else the gradients
  Gradients gradients;
  void* grad_value;  // in value's type, of fixed-point sums
};

namespace {

Problem problem_of(const Call& call) {
  Problem problem = {};
  problem.batch = call.batch;
  problem.queries = call.queries;
  problem.heads = call.heads;
  problem.channels = call.channels;
  problem.levels = static_cast<int>(call.levels);
  problem.points = static_cast<int>(call.points);
  if (call.levels > inline_levels)
    problem.all_levels = call.level;
  else
    memcpy(problem.level, call.level, call.levels * sizeof(Level));
  problem.queries_are_positions = call.queries == call.positions;
  problem.value = call.value;
  problem.reference_points = call.reference_points;
  problem.sampling = call.sampling;
  problem.attention = call.attention;
  memcpy(problem.value_stride, call.value_stride, sizeof(call.value_stride));
  memcpy(problem.reference_stride, call.reference_stride, sizeof(call.reference_stride));
  memcpy(problem.sampling_stride, call.sampling_stride, sizeof(call.sampling_stride));
  memcpy(problem.attention_stride, call.attention_stride, sizeof(call.attention_stride));
  return problem;
}

}  // namespace

extern "C" void forward(const Call* call) {
  with_type(static_cast<Type>(call->value_type),
            [&](auto kernels) { kernels.forward(Launch(), problem_of(*call), call->output); });
}

extern "C" void backward(const Call* call) {
  with_type(static_cast<Type>(call->value_type), [&](auto kernels) {
    kernels.backward(Launch(), problem_of(*call), call->positions, call->gradients);
    if (call->gradients.fixed)
      kernels.finish(Launch(), problem_of(*call), call->positions, call->gradients, call->grad_value);
  });
}

extern "C" int64_t size_of_call() { return sizeof(Call); }
