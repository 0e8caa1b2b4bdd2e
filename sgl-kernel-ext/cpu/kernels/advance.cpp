#include "advance.h"

#include <crosspool/atomic.h>

namespace crosspool {

namespace {

thread_local std::uint64_t* counted = nullptr;

}  // namespace

void count_advances(std::uint64_t* counter) { counted = counter; }

void advance() {
  if (counted == nullptr) return;
  Atomic<std::uint64_t> atomic(*counted);
  atomic.store(atomic.load(kRelaxed) + 1, kRelaxed);
}

}  // namespace crosspool
