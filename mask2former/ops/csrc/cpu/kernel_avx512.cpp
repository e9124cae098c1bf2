// The CPU kernels for AVX512.
#if defined(__GNUC__) && defined(__x86_64__)
#include "../ms_deform_attn.h"
#include "kernel.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define MASK2FORMER_CAPABILITY avx512
#define MASK2FORMER_VECTOR_BYTES 64
#include "kernels.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace mask2former {
namespace cpu {
const Kernels& kernels_avx512() { return avx512::KERNELS; }
}  // namespace cpu
}  // namespace mask2former
#endif
