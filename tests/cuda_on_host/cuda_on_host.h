// Enough of CUDA's language for the host's compiler to compile kernels and run them: a block's threads are fibers that
// take turns, and a shuffle waits until all threads of the warp have come to it. A shuffle that part of a warp
// never comes to, which on a GPU is undefined, ends the program with a message.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)

struct Index3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace cuda_on_host {

struct Warp {
  unsigned char slots[2][32][8];  // what each lane gives away: two, as a fast lane may be one shuffle ahead
  int arrived = 0;
  long done = 0;  // shuffles
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool finished = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::function<void()> body;
inline unsigned current;
inline bool progress;

inline void run_fiber() {
  body();
  fibers[current].finished = true;
  progress = true;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void wait_for_warp() {
  const unsigned self = current;
  Warp& warp = warps[self / 32];
  const long round = warp.done;
  progress = true;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.done;
    return;
  }
  while (warp.done == round) swapcontext(&fibers[self].context, &scheduler);
}

inline void run_block(unsigned threads) {
  constexpr size_t stack_size = 1 << 16;
  if (threads % 32 != 0) abort();
  fibers.resize(threads);
  warps.assign(threads / 32, Warp());
  for (Fiber& fiber : fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[stack_size]);
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_size;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool alive = true; alive;) {
    alive = progress = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].finished) continue;
      alive = true;
      swapcontext(&scheduler, &fibers[current].context);
    }
    if (alive && !progress) {
      fputs("threads of a warp wait for others that never come to the shuffle\n", stderr);
      abort();
    }
  }
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return current; }
  } x;
};

}  // namespace cuda_on_host

inline const cuda_on_host::ThreadIndex threadIdx;
inline Index3 blockIdx, gridDim;

namespace cuda_on_host {

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  gridDim = {blocks, 1, 1};
  body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < blocks; ++block) {
    blockIdx = {block, 0, 0};
    run_block(threads);
  }
}

template <typename T>
T exchange(T given, unsigned from) {
  Warp& warp = warps[current / 32];
  auto& slots = warp.slots[warp.done % 2];
  memcpy(slots[current % 32], &given, sizeof(given));
  wait_for_warp();
  memcpy(&given, slots[from], sizeof(given));
  return given;
}

}  // namespace cuda_on_host

template <typename T>
T __shfl_sync(unsigned, T given, int from, int width) {
  const unsigned lane = cuda_on_host::current % 32;
  return cuda_on_host::exchange(given, lane / width * width + from % width);
}

template <typename T>
T __shfl_xor_sync(unsigned, T given, int distance, int) {
  return cuda_on_host::exchange(given, cuda_on_host::current % 32 ^ distance);
}

inline uint4 __ldg(const uint4* source) {
  if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
    fputs("a 128-bit load is not aligned\n", stderr);
    abort();
  }
  uint4 result;
  memcpy(&result, source, sizeof(result));
  return result;
}

template <typename T>
T atomicAdd(T* target, T number) {
  const T before = *target;
  *target += number;
  return before;
}

inline unsigned atomicOr(unsigned* target, unsigned bits) {
  const unsigned before = *target;
  *target |= bits;
  return before;
}

inline float float_of_half_bits(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, digits = bits & 1023;
  float result;
  if (exponent == 0) {
    result = static_cast<float>(digits) / 16777216.0f;
    return sign ? -result : result;
  }
  const uint32_t wide = sign | (exponent == 31 ? 255 : exponent + 112) << 23 | digits << 13;
  memcpy(&result, &wide, sizeof(result));
  return result;
}

inline uint16_t half_bits_of_float(float number) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &number, sizeof(bits));
  const uint16_t sign = bits >> 16 & 0x8000;
  const float size = number < 0 ? -number : number;
  if (!(size <= 3.0e38f)) return number != number ? 0x7e00 : sign | 0x7c00;
  if (size >= 65520.0f) return sign | 0x7c00;
  // Adding a number this much larger leaves of `size` what a float16 can hold.
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 < -14 ? -14 : static_cast<int>(bits >> 23 & 255) - 127;
  const uint32_t step_bits = static_cast<uint32_t>(exponent - 10 + 127) << 23;
  float step;
  memcpy(&step, &step_bits, sizeof(step));
  const uint32_t steps = static_cast<uint32_t>(__builtin_nearbyintf(size / step));
  return static_cast<uint16_t>(sign | (exponent == -14 ? steps : (static_cast<uint32_t>(exponent + 14) << 10) + steps));
}
