// Results of masks on CPU tensors: memory, threads, and checks of what would reach outside of memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "kernel.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

constexpr int64_t TILE_ROWS = 8;

void check_type(const Tensor& tensor, at::ScalarType type, int64_t dimensions, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == dimensions && tensor.device().is_cpu(), name, " must be ",
              type, " on a CPU and have ", dimensions, " dimensions, but is ", tensor.scalar_type(), " on ",
              tensor.device(), " and has shape ", tensor.sizes());
}

void check_indices(const Tensor& indices, int64_t size, const char* name) {
  const int64_t* data = indices.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < indices.numel(); ++i)
    TORCH_CHECK(data[i] >= 0 && data[i] < size, name, " must be from 0 to ", size - 1, ", but has ", data[i]);
}

// The arguments that describe a strip, and the strip that points into them.
struct StripArguments {
  StripArguments(const Tensor& maps, const Tensor& low, const Tensor& high, const Tensor& share) {
    check_type(maps, at::kFloat, 3, "maps");
    check_type(low, at::kLong, 1, "low");
    check_type(high, at::kLong, 1, "high");
    check_type(share, at::kFloat, 1, "share");
    TORCH_CHECK(low.sizes() == high.sizes() && low.sizes() == share.sizes(),
                "low, high and share must have one number a row, but have shapes ", low.sizes(), ", ", high.sizes(),
                " and ", share.sizes());
    this->maps = maps.stride(2) == 1 ? maps : maps.contiguous();
    this->low = low.contiguous();
    this->high = high.contiguous();
    this->share = share.contiguous();
    check_indices(this->low, maps.size(1), "low");
    check_indices(this->high, maps.size(1), "high");
    strip.masks = maps.size(0);
    strip.rows = low.size(0);
    strip.columns = maps.size(2);
    strip.maps = this->maps.const_data_ptr<float>();
    strip.mask_stride = this->maps.stride(0);
    strip.row_stride = this->maps.stride(1);
    strip.low = this->low.const_data_ptr<int64_t>();
    strip.high = this->high.const_data_ptr<int64_t>();
    strip.share = this->share.const_data_ptr<float>();
  }

  Tensor maps, low, high, share;
  MaskStrip strip = {};
};

// Calls function(tile, thread, workspace) for all tiles of a strip, on all threads. Which thread has which tiles, and
// in which order, depends on their number alone.
template <typename Function>
void for_tiles(const MaskStrip& strip, size_t workspace_bytes, Function function) {
  const int64_t across = divide_up(strip.columns, TILE_COLUMNS);
  at::parallel_for(0, across * divide_up(strip.rows, TILE_ROWS), 1, [&](int64_t first, int64_t last) {
    Memory workspace(workspace_bytes);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / across * TILE_ROWS, column = i % across * TILE_COLUMNS;
      const Tile tile{row, std::min(row + TILE_ROWS, strip.rows), column,
                      std::min(column + TILE_COLUMNS, strip.columns)};
      function(tile, at::get_thread_num(), workspace.get());
    }
  });
}

struct ProbabilityArguments {
  ProbabilityArguments(const Tensor& probabilities, int64_t masks) {
    check_type(probabilities, at::kFloat, 2, "class_probabilities");
    TORCH_CHECK(probabilities.size(1) == masks, "class_probabilities must be (K, N) with N ", masks,
                ", but has shape ", probabilities.sizes());
    of_classes = probabilities.contiguous();
    classes.classes = probabilities.size(0);
    classes.padded = divide_up(classes.classes, CLASSES_PADDED) * CLASSES_PADDED;
    classes.of_classes = of_classes.const_data_ptr<float>();
    of_masks.resize(masks * classes.padded);
    for (int64_t k = 0; k < classes.classes; ++k)
      for (int64_t n = 0; n < masks; ++n) {
        const float probability = classes.of_classes[k * masks + n];
        TORCH_CHECK(!(probability < 0), "class_probabilities must be 0 or more, but has ", probability);
        of_masks[n * classes.padded + k] = probability;
      }
    classes.of_masks = of_masks.data();
  }

  Tensor of_classes;
  std::vector<float> of_masks;
  ClassProbabilities classes = {};
};

Tensor class_labels(const Tensor& maps, const Tensor& low, const Tensor& high, const Tensor& share,
                    const Tensor& class_probabilities) {
  const StripArguments arguments(maps, low, high, share);
  const MaskStrip& strip = arguments.strip;
  const ProbabilityArguments probabilities(class_probabilities, strip.masks);
  const ClassProbabilities& classes = probabilities.classes;
  Tensor labels = at::empty({strip.rows, strip.columns}, maps.options().dtype(at::kInt));
  int32_t* to = labels.mutable_data_ptr<int32_t>();
  for_tiles(strip, kernels().masks.workspace_size(strip, classes), [&](const Tile& tile, int, void* workspace) {
    kernels().masks.class_labels(strip, tile, classes, to, workspace);
  });
  return labels;
}

void class_scores(const Tensor& maps, const Tensor& low, const Tensor& high, const Tensor& share,
                  const Tensor& class_probabilities, const Tensor& scores) {
  const StripArguments arguments(maps, low, high, share);
  const MaskStrip& strip = arguments.strip;
  const ProbabilityArguments probabilities(class_probabilities, strip.masks);
  const ClassProbabilities& classes = probabilities.classes;
  check_type(scores, at::kFloat, 3, "scores");
  TORCH_CHECK(scores.size(0) == classes.classes && scores.size(1) == strip.rows &&
                  scores.size(2) == strip.columns && (scores.stride(2) == 1 || strip.columns <= 1),
              "scores must be (K, R, W) with ", classes.classes, ", ", strip.rows, " and ", strip.columns,
              " and have contiguous rows, but has shape ", scores.sizes(), " and strides ", scores.strides());
  float* to = scores.mutable_data_ptr<float>();
  for_tiles(strip, kernels().masks.workspace_size(strip, classes), [&](const Tile& tile, int, void* workspace) {
    kernels().masks.class_scores(strip, tile, classes, to, scores.stride(0), scores.stride(1), workspace);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mask_winners(const Tensor& maps, const Tensor& low, const Tensor& high,
                                                        const Tensor& share, const Tensor& rivals,
                                                        const Tensor& scores) {
  const StripArguments arguments(maps, low, high, share);
  const MaskStrip& strip = arguments.strip;
  check_type(rivals, at::kLong, 1, "rivals");
  check_type(scores, at::kFloat, 1, "scores");
  const int64_t count = rivals.size(0);
  TORCH_CHECK(count > 0 && scores.size(0) == count, "rivals and scores must have one number each, and at least one, ",
              "but have shapes ", rivals.sizes(), " and ", scores.sizes());
  const Tensor masks = rivals.contiguous(), scores_of_masks = scores.contiguous();
  check_indices(masks, strip.masks, "rivals");
  Tensor winner = at::empty({strip.rows, strip.columns}, maps.options().dtype(at::kInt));
  // Each thread counts for itself.
  Tensor counts = at::zeros({at::get_num_threads(), 3, count}, maps.options().dtype(at::kLong));
  int64_t* const counted = counts.mutable_data_ptr<int64_t>();
  int32_t* const to = winner.mutable_data_ptr<int32_t>();
  for_tiles(strip, 0, [&](const Tile& tile, int thread, void*) {
    int64_t* const own = counted + thread * 3 * count;
    const Rivals all{count, masks.const_data_ptr<int64_t>(), scores_of_masks.const_data_ptr<float>(), to,
                     own,   own + count,                     own + 2 * count};
    kernels().masks.winners(strip, tile, all);
  });
  counts = counts.sum(0);
  return {winner, counts[0].clone(), counts[1].clone(), counts[2].clone()};
}

// For each of `count` masks, the instances that show it, as BinaryMasks has them.
struct Copies {
  Copies(const int64_t* masks, int64_t instances, int64_t count) : starts(count + 1), places(instances) {
    for (int64_t i = 0; i < instances; ++i) ++starts[masks[i] + 1];
    for (int64_t n = 0; n < count; ++n) starts[n + 1] += starts[n];
    std::vector<int64_t> next(starts);
    for (int64_t i = 0; i < instances; ++i) places[next[masks[i]]++] = i;
  }

  std::vector<int64_t> starts, places;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> binary_masks(const Tensor& maps, const Tensor& low, const Tensor& high,
                                                        const Tensor& share, const Tensor& places,
                                                        const Tensor& binary) {
  const StripArguments arguments(maps, low, high, share);
  const MaskStrip& strip = arguments.strip;
  check_type(places, at::kLong, 1, "places");
  check_type(binary, at::kBool, 3, "binary");
  TORCH_CHECK(binary.size(0) == places.size(0) && binary.size(1) == strip.rows && binary.size(2) == strip.columns &&
                  (binary.stride(2) == 1 || strip.columns <= 1),
              "binary must be (M, R, W) with ", places.size(0), ", ", strip.rows, " and ", strip.columns,
              " and have contiguous rows, but has shape ", binary.sizes(), " and strides ", binary.strides());
  const Tensor masks = places.contiguous();
  check_indices(masks, strip.masks, "places");
  const Copies copies(masks.const_data_ptr<int64_t>(), places.size(0), strip.masks);
  // Each thread sums up for itself.
  const int64_t threads = at::get_num_threads(), count = strip.masks;
  const Tensor above_half = at::zeros({threads, count}, maps.options());
  const Tensor area = at::zeros({threads, count}, maps.options().dtype(at::kLong));
  const Tensor in_columns = at::zeros({threads, count, strip.columns}, maps.options().dtype(at::kByte));
  const Tensor in_rows = at::zeros({threads, count, strip.rows}, maps.options().dtype(at::kByte));
  BinaryMasks all{};
  all.copies = copies.starts.data();
  all.places = copies.places.data();
  all.masks = reinterpret_cast<uint8_t*>(binary.mutable_data_ptr<bool>());
  all.mask_stride = binary.stride(0);
  all.row_stride = binary.stride(1);
  all.above_half = above_half.mutable_data_ptr<float>();
  all.area = area.mutable_data_ptr<int64_t>();
  all.in_columns = in_columns.mutable_data_ptr<uint8_t>();
  all.in_rows = in_rows.mutable_data_ptr<uint8_t>();
  for_tiles(strip, 0, [&](const Tile& tile, int thread, void*) {
    BinaryMasks own = all;
    own.above_half += thread * count;
    own.area += thread * count;
    own.in_columns += thread * count * strip.columns;
    own.in_rows += thread * count * strip.rows;
    kernels().masks.binary_masks(strip, tile, own);
  });
  return {above_half.sum(0), area.sum(0), in_columns.amax(0).to(at::kBool), in_rows.amax(0).to(at::kBool)};
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("class_labels", class_labels);
  m.impl("class_scores", class_scores);
  m.impl("mask_winners", mask_winners);
  m.impl("binary_masks", binary_masks);
}

}  // namespace cpu
}  // namespace mask2former
