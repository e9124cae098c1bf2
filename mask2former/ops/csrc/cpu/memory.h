// Memory of kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace mask2former {
namespace cpu {

// Memory of one thread, aligned as the kernels need it.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes + 64) {}
  void* get() {
    const auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<void*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<char> bytes_;
};

}  // namespace cpu
}  // namespace mask2former
