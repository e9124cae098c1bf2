// 3x3 convolutions of CPU tensors in Winograd's way (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks", CVPR 2016): tiles of 4x4 results take 36 products for each pair of channels where there are 144 else. Some
// tiles at a time, so that their frequencies stay in the caches.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>

#include "kernel.h"
#include "matrices.h"
#include "work.h"

namespace mask2former {
namespace cpu {
namespace {

using at::Tensor;

// Of frequencies in and out at a time, for all threads together.
constexpr int64_t CHUNK_BYTES = 16 << 20;

void check(const Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == at::kFloat && tensor.device().is_cpu(), name,
              " must be Float on a CPU and have four dimensions, but is ", tensor.scalar_type(), " on ",
              tensor.device(), " and has shape ", tensor.sizes());
}

Tensor channels_last(const Tensor& x) { return x.contiguous(at::MemoryFormat::ChannelsLast); }

// Of the pictures of a batch, one after another, row by row.
struct Tiles {
  int64_t height, width, rows, columns, count;
  explicit Tiles(const Tensor& x)
      : height(x.size(2)),
        width(x.size(3)),
        rows(divide_up(height, TILE_SIDE)),
        columns(divide_up(width, TILE_SIDE)),
        count(x.size(0) * rows * columns) {}

  // Calls function(tile, map, top, left) for tiles [first, last), on all threads, with the tile's number since `first`.
  template <typename T, typename Function>
  void on_all_threads(int64_t first, int64_t last, T* data, int64_t channels, Function function) const {
    at::parallel_for(first, last, 8, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t picture = tile / (rows * columns), place = tile % (rows * columns);
        const MapOf<T> map{data + picture * height * width * channels, height, width, channels};
        function(tile - first, map, place / columns * TILE_SIDE, place % columns * TILE_SIDE);
      }
    });
  }
};

// Memory for rows (channels) of some tiles and all frequencies.
class Frequencies {
 public:
  Frequencies(int64_t tiles, int64_t channels)
      : memory_(at::empty({FREQUENCIES * tiles * channels}, at::kFloat)), channels_(channels) {}
  float* data() { return memory_.mutable_data_ptr<float>(); }
  // (36, tiles, channels), contiguous: torch's batched products are slow where results have gaps.
  Tensor of(int64_t tiles) const {
    return memory_.narrow(0, 0, FREQUENCIES * tiles * channels_).view({FREQUENCIES, tiles, channels_});
  }

 private:
  Tensor memory_;
  int64_t channels_;
};

// Tiles at a time, of `tiles` that there are, as many each time.
int64_t chunk_of(int64_t tiles, int64_t channels) {
  const int64_t fit = CHUNK_BYTES / int64_t(FREQUENCIES * std::max<int64_t>(1, channels) * sizeof(float));
  return divide_up(tiles, std::max<int64_t>(1, divide_up(tiles, std::max<int64_t>(64, fit))));
}

constexpr std::array<float, FREQUENCIES * 9> weights_at_points() {
  constexpr float NEAR2 = NEAR_POINT * NEAR_POINT, FAR2 = FAR_POINT * FAR_POINT;
  constexpr float NEAR_SHARE = 1 / (2 * NEAR2 * (NEAR2 - FAR2)), FAR_SHARE = 1 / (2 * FAR2 * (FAR2 - NEAR2));
  constexpr float AT_POINTS[FREQUENCIES_SIDE][3] = {{1 / (NEAR2 * FAR2), 0, 0},
                                                    {NEAR_SHARE, NEAR_SHARE * NEAR_POINT, NEAR_SHARE * NEAR2},
                                                    {NEAR_SHARE, -NEAR_SHARE * NEAR_POINT, NEAR_SHARE * NEAR2},
                                                    {FAR_SHARE, FAR_SHARE * FAR_POINT, FAR_SHARE * FAR2},
                                                    {FAR_SHARE, -FAR_SHARE * FAR_POINT, FAR_SHARE * FAR2},
                                                    {0, 0, 1}};
  std::array<float, FREQUENCIES * 9> result{};
  size_t next = 0;
  for (const auto& down : AT_POINTS)
    for (const auto& along : AT_POINTS)
      for (const float row : down)
        for (const float column : along) result[next++] = row * column;
  return result;
}

// (36, 9): weights to frequencies.
Tensor weight_transform() {
  static constexpr std::array<float, FREQUENCIES * 9> NUMBERS = weights_at_points();
  return at::from_blob(const_cast<float*>(NUMBERS.data()), {FREQUENCIES, 9}, at::TensorOptions(at::kFloat));
}

// (36, C, K) of weights whose dimensions are in that order: 3, 3, C, K.
Tensor weight_frequencies(const Tensor& weight) {
  const int64_t in = weight.size(2), out = weight.size(3);
  return at::mm(weight_transform(), weight.reshape({9, in * out})).view({FREQUENCIES, in, out});
}

Tensor convolve(const Tensor& x_, const Tensor& weight, const float* bias) {
  const Tensor x = channels_last(x_);
  const int64_t in = weight.size(1), out = weight.size(2);
  Tensor result = at::empty({x.size(0), out, x.size(2), x.size(3)}, x.options(), at::MemoryFormat::ChannelsLast);
  const Tiles tiles(x);
  const int64_t chunk = chunk_of(tiles.count, in + out);
  Frequencies inputs(chunk, in), outputs(chunk, out);
  const float* const from = x.const_data_ptr<float>();
  float* const to = result.mutable_data_ptr<float>();
  const ConvolutionKernels& kernel = kernels().convolution;
  for (int64_t first = 0; first < tiles.count; first += chunk) {
    const int64_t last = std::min(tiles.count, first + chunk);
    float* const before = inputs.data();
    tiles.on_all_threads(first, last, from, in, [&](int64_t tile, const auto& map, int64_t top, int64_t left) {
      kernel.transform_input(map, top, left, before + tile * in, (last - first) * in);
    });
    Tensor products = outputs.of(last - first);
    multiply_batch(inputs.of(last - first), weight, products);
    const float* const after = outputs.data();
    tiles.on_all_threads(first, last, to, out, [&](int64_t tile, const auto& map, int64_t top, int64_t left) {
      kernel.transform_output(after + tile * out, (last - first) * out, bias, map, top, left);
    });
  }
  return result;
}

Tensor conv3x3(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias_) {
  check(x, "x");
  check(weight, "weight");
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({weight.size(0), x.size(1), 3, 3}), "weight must be (K, ", x.size(1),
              ", 3, 3), but has shape ", weight.sizes());
  Tensor bias;
  if (bias_.has_value()) {
    bias = bias_->contiguous();
    TORCH_CHECK(bias.scalar_type() == at::kFloat && bias.sizes() == at::IntArrayRef({weight.size(0)}),
                "bias must be Float and have shape [", weight.size(0), "], but is ", bias.scalar_type(),
                " and has shape ", bias.sizes());
  }
  const float* const shift = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  return convolve(x, weight_frequencies(weight.permute({2, 3, 1, 0})), shift);
}

Tensor conv3x3_backward_input(const Tensor& grad, const Tensor& weight) {
  check(grad, "grad");
  check(weight, "weight");
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({grad.size(1), weight.size(1), 3, 3}), "weight must be (", grad.size(1),
              ", C, 3, 3), but has shape ", weight.sizes());
  return convolve(grad, weight_frequencies(weight.flip({2, 3}).permute({2, 3, 0, 1})), nullptr);
}

Tensor conv3x3_backward_weight(const Tensor& grad_, const Tensor& x_) {
  check(grad_, "grad");
  check(x_, "x");
  TORCH_CHECK(grad_.size(0) == x_.size(0) && grad_.size(2) == x_.size(2) && grad_.size(3) == x_.size(3),
              "grad and x must be of the same pictures, but have shapes ", grad_.sizes(), " and ", x_.sizes());
  const Tensor grad = channels_last(grad_), x = channels_last(x_);
  const int64_t in = x.size(1), out = grad.size(1);
  const Tiles tiles(x);
  const int64_t chunk = chunk_of(tiles.count, in + out);
  Frequencies inputs(chunk, in), gradients(chunk, out);
  Tensor sums = at::zeros({FREQUENCIES, in, out}, x.options());
  const float* const cells = x.const_data_ptr<float>();
  const float* const changes = grad.const_data_ptr<float>();
  const ConvolutionKernels& kernel = kernels().convolution;
  for (int64_t first = 0; first < tiles.count; first += chunk) {
    const int64_t last = std::min(tiles.count, first + chunk);
    float* const input = inputs.data();
    tiles.on_all_threads(first, last, cells, in, [&](int64_t tile, const auto& map, int64_t top, int64_t left) {
      kernel.transform_input(map, top, left, input + tile * in, (last - first) * in);
    });
    float* const gradient = gradients.data();
    tiles.on_all_threads(first, last, changes, out, [&](int64_t tile, const auto& map, int64_t top, int64_t left) {
      kernel.transform_gradient(map, top, left, gradient + tile * out, (last - first) * out);
    });
    add_products_of_batch(inputs.of(last - first).transpose(1, 2), gradients.of(last - first), sums);
  }
  return at::mm(weight_transform().t(), sums.view({FREQUENCIES, in * out}))
      .view({3, 3, in, out})
      .permute({3, 2, 0, 1})
      .contiguous();
}

}  // namespace

TORCH_LIBRARY_IMPL(mask2former, CPU, m) {
  m.impl("conv3x3", conv3x3);
  m.impl("conv3x3_backward_input", conv3x3_backward_input);
  m.impl("conv3x3_backward_weight", conv3x3_backward_weight);
}

}  // namespace cpu
}  // namespace mask2former
