// Memory of the resident loop: on the device, and on the host, mapped for the device.
#ifndef CROSSPOOL_CUDA_MEMORY_H
#define CROSSPOOL_CUDA_MEMORY_H

#include <cstddef>
#include <cstring>
#include <span>
#include <utility>

#include "calls.h"
#include "residency.h"

namespace crosspool::gpu {

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t count) : bytes_(count * sizeof(T)) {
    not_beside_a_loop("allocating device memory of the loop");
    check(calls().device_alloc(&memory_, bytes_), "allocating device memory of the loop");
  }
  DeviceArray(DeviceArray&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), bytes_(other.bytes_) {}
  DeviceArray& operator=(DeviceArray&&) = delete;
  ~DeviceArray() {
    if (memory_ != nullptr) calls().device_free(memory_);
  }

  T* data() const { return static_cast<T*>(memory_); }
  std::size_t bytes() const { return bytes_; }
  // Copies in the stream's order; `values` must stay until the stream is done.
  void fill(std::span<const T> values, Stream stream) const {
    check(calls().copy_to_device(memory_, values.data(), values.size_bytes(), stream),
          "copying the loop's tables to the device");
  }

 private:
  void* memory_ = nullptr;
  std::size_t bytes_;
};

// Zeroed at first.
template <class T>
class MappedArray {
 public:
  explicit MappedArray(std::size_t count) {
    not_beside_a_loop("allocating mapped host memory");
    check(calls().host_alloc(&memory_, count * sizeof(T)), "allocating mapped host memory");
    std::memset(memory_, 0, count * sizeof(T));
  }
  MappedArray(MappedArray&&) = delete;
  MappedArray& operator=(MappedArray&&) = delete;
  ~MappedArray() { calls().host_free(memory_); }

  T& operator[](std::size_t i) const { return static_cast<T*>(memory_)[i]; }

 private:
  void* memory_ = nullptr;
};

}  // namespace crosspool::gpu

#endif
