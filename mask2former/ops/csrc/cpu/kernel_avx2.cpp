// The CPU kernels for AVX2.
#if defined(__GNUC__) && defined(__x86_64__)
#include "../ms_deform_attn.h"
#include "kernel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define MASK2FORMER_CAPABILITY avx2
#define MASK2FORMER_VECTOR_BYTES 32
#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mask2former {
namespace cpu {
const Kernels& kernels_avx2() { return avx2::KERNELS; }
}  // namespace cpu
}  // namespace mask2former
#endif
