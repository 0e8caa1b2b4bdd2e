// A doorbell on a cache line of its own.
#ifndef CROSSPOOL_TEST_BELL_H
#define CROSSPOOL_TEST_BELL_H

#include <crosspool/signal.h>

struct alignas(64) Bell {
  crosspool_doorbell doorbell{};
};

#endif
