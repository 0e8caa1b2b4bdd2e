#ifndef CROSSPOOL_EXPORT_H
#define CROSSPOOL_EXPORT_H

#include <stdint.h>

#define CROSSPOOL_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change of these headers; native.py refuses a library of another version. */
#define CROSSPOOL_ABI_VERSION 14
CROSSPOOL_API uint32_t crosspool_abi_version(void);

#ifdef __cplusplus
}
#endif

#endif
