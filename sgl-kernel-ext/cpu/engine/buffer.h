// Memory for activations, on huge pages where the system has them. A page takes memory once it is
// touched.
#ifndef CROSSPOOL_CPU_ENGINE_BUFFER_H
#define CROSSPOOL_CPU_ENGINE_BUFFER_H

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace crosspool {

// Bytes of an element of the widest dtype: a buffer serves models of every dtype.
inline constexpr std::int64_t kWidestElement = 4;

class Buffer {
 public:
  Buffer() = default;
  // Zeroed, aligned to a page. Throws std::bad_alloc.
  explicit Buffer(std::int64_t bytes) : bytes_(static_cast<std::size_t>(bytes > 0 ? bytes : 1)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) {
      data_ = nullptr;
      throw std::bad_alloc();
    }
    madvise(data_, bytes_, MADV_HUGEPAGE);  // small pages are only slower
  }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) munmap(data_, bytes_);
  }

  // Makes room for so many bytes. Where there was less, what was there is lost. Throws
  // std::bad_alloc, and leaves it as it was.
  void reserve(std::int64_t bytes) {
    if (data_ == nullptr || static_cast<std::int64_t>(bytes_) < bytes) *this = Buffer(bytes);
  }

  void* data() const { return data_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace crosspool

#endif
