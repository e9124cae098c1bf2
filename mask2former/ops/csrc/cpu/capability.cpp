// The choice of the kernels' capability.
#include <ATen/Context.h>
#include <ATen/Version.h>

#include <string>

#include "kernel.h"

namespace mask2former {
namespace cpu {

// Follows torch's own choice, and so ATEN_CPU_CAPABILITY.
const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#if defined(__GNUC__) && defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && capability == "AVX512") return kernels_avx512();
    if (avx2 && (capability == "AVX512" || capability == "AVX2")) return kernels_avx2();
#endif
    return kernels_default();
  }();
  return chosen;
}

// torch's are mostly those of MKL, which takes AVX512 on Intel's CPUs alone.
bool has_faster_products() {
#if defined(__GNUC__) && defined(__x86_64__)
  static const bool is_faster = kernels().products.multiply && at::hasMKL() && !__builtin_cpu_is("intel");
  return is_faster;
#else
  return false;
#endif
}

}  // namespace cpu
}  // namespace mask2former
