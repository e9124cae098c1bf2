// The CPU kernels for every CPU of the platform (SSE2, NEON).
#include "../ms_deform_attn.h"
#include "kernel.h"

// Vectors of four float64 are wider than a register here, and passed to functions as older compilers did not: nobody
// passes them, because those functions are inlined.
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define MASK2FORMER_CAPABILITY plain
#define MASK2FORMER_VECTOR_BYTES 16
#include "kernels.inc.h"

namespace mask2former {
namespace cpu {
const Kernels& kernels_default() { return plain::KERNELS; }
}  // namespace cpu
}  // namespace mask2former
