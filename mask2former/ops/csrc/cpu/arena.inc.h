// Memory of one thread, handed out piece by piece; for one CPU capability, in its own namespace: see kernels.inc.h.

constexpr size_t ALIGNMENT = 64;

struct Arena {
  uint64_t next;  // address
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next);
    next += (size_t(count) * sizeof(T) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return taken;
  }
};
