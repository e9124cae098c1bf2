// Masks at points on CPU tensors: checks and threads.
//
// Letters: N maps, H and W their size, R rows of points, P points of each.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernel.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

MapSize checked_size(const Tensor& maps) {
  TORCH_CHECK(maps.dim() == 3 && maps.size(1) >= 2 && maps.size(2) >= 2,
              "maps must be (N, H, W), at least 2 x 2, but have shape ", maps.sizes());
  TORCH_CHECK(maps.size(1) < (int64_t(1) << 31) / maps.size(2), "maps must have fewer than 2^31 cells");
  TORCH_CHECK(maps.size(0) == 0 || (maps.stride(2) == 1 && maps.stride(1) == maps.size(2)),
              "rows of a map must follow one another");  // where there are no maps, strides may be anything
  return {maps.size(1), maps.size(2)};
}

// Rows may lie apart, but each is contiguous.
void check_rows(const Tensor& tensor, const char* name, at::IntArrayRef shape) {
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.device().is_cpu() && tensor.sizes() == shape, name,
              " must be float32 on the CPU, of shape ", shape, ", but are ", tensor.scalar_type(), " of shape ",
              tensor.sizes());
  TORCH_CHECK(tensor.numel() == 0 || tensor.select(0, 0).is_contiguous(), name, " must have contiguous rows");
}

void check_floats(const Tensor& tensor, const char* name, at::IntArrayRef shape) {
  check_rows(tensor, name, shape);
  TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

Tensor random_points(at::IntArrayRef shape, int64_t seed) {
  Tensor numbers = at::empty(shape, at::kFloat);
  float* data = numbers.mutable_data_ptr<float>();
  const int64_t count = numbers.numel(), blocks = divide_up(count, RANDOM_BLOCK);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * RANDOM_BLOCK;
      kernels().points.uniform(uint64_t(seed), uint64_t(block), std::min(RANDOM_BLOCK, count - first), data + first);
    }
  });
  return numbers;
}

Tensor sample_points(const Tensor& maps, const Tensor& points, const std::optional<Tensor>& index) {
  const MapSize size = checked_size(maps);
  TORCH_CHECK(points.dim() == 3, "points must be (R, P, 2), but have shape ", points.sizes());
  const int64_t rows = points.size(0), count = points.size(1);
  check_floats(points, "points", {rows, count, 2});
  TORCH_CHECK(maps.scalar_type() == at::kFloat || maps.scalar_type() == at::kBool, "maps must be float32 or bool");
  const int64_t* map_of_row = nullptr;
  if (index) {
    TORCH_CHECK(index->scalar_type() == at::kLong && index->device().is_cpu() && index->is_contiguous() &&
                    index->sizes() == at::IntArrayRef{rows},
                "index must be (R) int64, contiguous, on the CPU");
    map_of_row = index->const_data_ptr<int64_t>();
    for (int64_t i = 0; i < rows; ++i)
      TORCH_CHECK(0 <= map_of_row[i] && map_of_row[i] < maps.size(0), "there is no map ", map_of_row[i]);
  } else {
    TORCH_CHECK(maps.size(0) == rows, "there are ", maps.size(0), " maps for ", rows, " rows of points");
  }
  Tensor values = at::empty({rows, count}, points.options());
  const float* from = points.const_data_ptr<float>();
  float* to = values.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t offset = (map_of_row ? map_of_row[i] : i) * maps.stride(0);
      if (maps.scalar_type() == at::kBool) {
        const auto* data = reinterpret_cast<const uint8_t*>(maps.const_data_ptr<bool>());
        kernels().points.sample_bools(data + offset, size, from + i * count * 2, count, to + i * count);
      } else {
        kernels().points.sample(maps.const_data_ptr<float>() + offset, size, from + i * count * 2, count, to + i * count);
      }
    }
  });
  return values;
}

void spread_points(const Tensor& values, const Tensor& points, const Tensor& maps) {
  const MapSize size = checked_size(maps);
  TORCH_CHECK(values.dim() == 2, "values must be (N, P), but have shape ", values.sizes());
  const int64_t count = values.size(1);
  check_floats(values, "values", {maps.size(0), count});
  check_floats(points, "points", {maps.size(0), count, 2});
  TORCH_CHECK(maps.scalar_type() == at::kFloat, "maps must be float32");
  float* to = maps.mutable_data_ptr<float>();
  at::parallel_for(0, maps.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().points.spread(values.const_data_ptr<float>() + i * count, points.const_data_ptr<float>() + i * count * 2,
                       count, to + i * maps.stride(0), size);
  });
}

// Numbers [first, first + count) of those that random_points() gives for a seed, by way of a block's memory.
void random_numbers(int64_t seed, int64_t first, int64_t count, float* block_numbers, float* to) {
  for (int64_t i = 0; i < count;) {
    const int64_t block = (first + i) / RANDOM_BLOCK, offset = (first + i) % RANDOM_BLOCK;
    const int64_t here = std::min(RANDOM_BLOCK - offset, count - i);
    kernels().points.uniform(uint64_t(seed), uint64_t(block), offset + here, block_numbers);
    std::copy_n(block_numbers + offset, here, to + i);
    i += here;
  }
}

void draw_nearest_to_zero(const Tensor& maps, int64_t drawn, int64_t seed, const Tensor& points,
                          const Tensor& values) {
  const MapSize size = checked_size(maps);
  TORCH_CHECK(maps.scalar_type() == at::kFloat, "maps must be float32");
  TORCH_CHECK(values.dim() == 2, "values must be (N, P), but have shape ", values.sizes());
  const int64_t kept = values.size(1);
  TORCH_CHECK(kept <= drawn && drawn < (int64_t(1) << 30), "can't keep ", kept, " of ", drawn, " points");
  check_rows(values, "values", {maps.size(0), kept});
  check_rows(points, "points", {maps.size(0), kept, 2});
  at::parallel_for(0, maps.size(0), 1, [&](int64_t begin, int64_t end) {
    // All that is drawn for a map, which together with it stays in a thread's own cache.
    std::vector<float> block_numbers(RANDOM_BLOCK), drawn_points(2 * drawn), drawn_values(drawn);
    for (int64_t i = begin; i < end; ++i) {
      random_numbers(seed, 2 * drawn * i, 2 * drawn, block_numbers.data(), drawn_points.data());
      kernels().points.sample(maps.const_data_ptr<float>() + i * maps.stride(0), size, drawn_points.data(), drawn,
                       drawn_values.data());
      kernels().points.nearest_to_zero(drawn_points.data(), drawn_values.data(), drawn, kept,
                                points.mutable_data_ptr<float>() + i * points.stride(0),
                                values.mutable_data_ptr<float>() + i * values.stride(0));
    }
  });
}

Tensor loss_sums(const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK(logits.dim() == 2, "logits must be (N, P), but have shape ", logits.sizes());
  const int64_t rows = logits.size(0), count = logits.size(1);
  check_floats(logits, "logits", {rows, count});
  check_floats(labels, "labels", {rows, count});
  Tensor sums = at::empty({rows, 4}, logits.options());
  const float *from = logits.const_data_ptr<float>(), *from_labels = labels.const_data_ptr<float>();
  float* to = sums.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().points.loss_sums(from + i * count, from_labels + i * count, count, to + i * 4);
  });
  return sums;
}

Tensor loss_sums_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels) {
  TORCH_CHECK(logits.dim() == 2, "logits must be (N, P), but have shape ", logits.sizes());
  const int64_t rows = logits.size(0), count = logits.size(1);
  check_floats(logits, "logits", {rows, count});
  check_floats(labels, "labels", {rows, count});
  check_floats(grad, "grad", {rows, 4});
  Tensor gradients = at::empty({rows, count}, logits.options());
  float* to = gradients.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().points.loss_sums_backward(grad.const_data_ptr<float>() + i * 4, logits.const_data_ptr<float>() + i * count,
                                   labels.const_data_ptr<float>() + i * count, count, to + i * count);
  });
  return gradients;
}

Tensor to_probabilities(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2, "logits must be (N, P), but have shape ", logits.sizes());
  const int64_t rows = logits.size(0), count = logits.size(1);
  check_rows(logits, "logits", {rows, count});
  Tensor sums = at::empty({rows, 2}, logits.options());
  float *numbers = logits.mutable_data_ptr<float>(), *to = sums.mutable_data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels().points.to_probabilities(numbers + i * logits.stride(0), count, to + i * 2);
  });
  return sums;
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("sample_points", sample_points);
  m.impl("spread_points", spread_points);
  m.impl("draw_nearest_to_zero", draw_nearest_to_zero);
  m.impl("loss_sums", loss_sums);
  m.impl("loss_sums_backward", loss_sums_backward);
  m.impl("to_probabilities", to_probabilities);
}
TORCH_LIBRARY_IMPL(mask2former, CompositeExplicitAutograd, m) { m.impl("random_points", random_points); }

}  // namespace cpu
}  // namespace mask2former
