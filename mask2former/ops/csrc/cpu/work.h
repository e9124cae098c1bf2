// How operators on CPU tensors share out work: in how many parts, and a thread's memory for one.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace mask2former {
namespace cpu {

inline int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

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
